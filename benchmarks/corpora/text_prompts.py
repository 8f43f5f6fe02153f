"""What a model is asked to write for `tiny`'s training text: forms of text over subjects, levels, places and tones.

`ask(seed, i)` is the i-th request: ("chat", a user's message) or ("plain", the beginning of a document). A form's
text has alternatives "[a|b]" and slots "{s}"; with some five hundred subjects and a hundred forms, two subjects in many
of them and several slots, a request hardly returns. Nothing here comes from a benchmark.
"""

from __future__ import annotations

import re

from benchmarks.corpora.made_up import NAMES, Draw

_BREAK = re.compile(" ?// ?")
SUBJECTS = [
    " ".join(subject.split())
    for field in """
    gravity; black holes; the water cycle; photosynthesis; cell division; the immune system; plate tectonics;
    volcanoes; the periodic table; acids and bases; magnetism; electricity; sound waves; optics and lenses;
    entropy; atoms; radioactivity; the solar system; comets; tides; clouds; lightning; earthquakes; glaciers;
    rivers; deserts; rainforests; coral reefs; fungi; bacteria; viruses; bees; ants; spiders; whales; sharks;
    owls; penguins; frogs; dinosaurs; horses; cats; dogs; wolves; evolution; genes and DNA; the human heart; the
    brain; sleep; digestion; muscles; teeth; eyesight; hearing

    diabetes; high blood pressure; asthma; migraine; a sprained ankle; food poisoning; vaccination; antibiotics;
    allergies; anaemia; a broken arm; pneumonia; arthritis; depression; anxiety; pregnancy; childhood fevers;
    stroke; kidney stones; burns; first aid; physiotherapy; nursing; surgery; dental care; nutrition; vitamins;
    exercise; hearing loss; skin rashes

    fractions; percentages; prime numbers; ratios; averages; probability; triangles; circles; angles; linear
    equations; quadratic equations; geometric series; permutations; sets; logarithms; speed and distance;
    compound interest; volume; units of measurement; statistics; graphs of functions; number patterns; money and
    change; ages; work rates; mixtures

    sorting algorithms; binary search; linked lists; hash tables; recursion; regular expressions; SQL queries;
    JSON files; web servers; HTML forms; CSS layouts; JavaScript events; Python dictionaries; Python classes; C
    pointers; Rust ownership; Java interfaces; shell scripts; git branches; unit tests; databases; compilers;
    operating systems; computer networks; encryption; passwords; spreadsheets; machine learning; neural
    networks; robots; image files; date arithmetic; string handling; matrices in code; a to-do list program; a
    bank account class; text parsing; graph search; stacks and queues; file reading

    ancient Egypt; the Roman Empire; the Silk Road; the Vikings; the Black Death; the Renaissance; the printing
    press; the French Revolution; the Industrial Revolution; the steam engine; the First World War; the Cold
    War; the moon landing; the Ottoman Empire; the Mughal Empire; the Aztecs; the Inca; feudal Japan; the Ming
    dynasty; the Mali Empire; the abolition of slavery; women's suffrage; the railways; the history of aviation;
    exploration of the poles; pirates; castles

    Brazil; Japan; Kenya; India; Canada; Egypt; Iceland; Peru; Vietnam; Turkey; Norway; Australia; Mexico;
    Poland; Morocco; Indonesia; Greece; Ireland; the Alps; the Himalayas; the Amazon; the Nile; the Sahara;
    Paris; Tokyo; London; New York; Istanbul; Nairobi; Buenos Aires; small islands; mountain villages; harbours;
    capital cities; maps; time zones; borders; deserts at night

    inflation; taxes; supply and demand; small businesses; marketing; job interviews; unemployment; banks;
    insurance; mortgages; budgets; stock markets; trade; startups; customer service; project management;
    meetings; salaries; contracts; copyright; privacy law; traffic rules; courts; juries; elections; parliament;
    human rights; the police; immigration; housing; public transport; recycling; climate change; solar power;
    wind farms; nuclear energy; electric cars; water shortage; farming

    bread; pasta; curry; soup; salads; pancakes; chocolate cake; apple pie; sushi; tacos; dumplings; roast
    chicken; grilled fish; vegetable stew; fried rice; omelettes; coffee; tea; cheese; olive oil; spices;
    fermentation; a packed lunch; breakfast; jam; baking without eggs; cooking for two; camping meals; street
    food; leftovers

    football; basketball; tennis; swimming; running a marathon; cycling; chess; climbing; sailing; skiing; yoga;
    boxing; cricket; the Olympic Games; fishing; hiking; gardening; roses; tomatoes; pruning trees; compost;
    knitting; pottery; woodworking; photography; painting; drawing faces; the piano; the guitar; drums; jazz;
    opera; folk songs; hip hop; choirs; ballet; theatre; film directing; comics; poetry; the short story;
    novels; fairy tales; museums; architecture; bridges; lighthouses; clocks; fashion; shoes; jewellery;
    furniture; toys; board games; video games; puzzles; magic tricks; kites

    friendship; honesty; courage; grief; jealousy; forgiveness; loneliness; a family quarrel; a wedding; a
    birthday party; a first day at school; moving house; growing old; raising children; teenage years;
    neighbours; a lost dog; a broken vase; a train journey; a storm at sea; a night in the forest; a haunted
    house; a dragon; a talking tree; a detective; a thief; a king and his daughter; a time machine; life on
    Mars; a robot that learns; an orphan; a wise grandmother; a secret letter; a market day; a power cut; a
    missed flight; a flooded street; a snowed-in cabin; a school play; a village doctor

    Buddhism; Islam; Christianity; Hinduism; Judaism; Greek myths; Norse myths; ethics; free will; the meaning
    of happiness; logic; paradoxes; the philosophy of science; Stoicism; education; homework; reading;
    handwriting; learning a language; grammar; punctuation; idioms; rhetoric; translation; dictionaries;
    spelling; dialects; sign language; body language; humour; sarcasm; proverbs; riddles; syllogisms; truth and
    lies; family trees; seating arrangements; calendars; dates and deadlines; directions on a map; colours of
    objects; ordering books on a shelf; word order; counting objects; brackets; sports rules; film
    recommendations; geometry of shapes; tables of numbers; true and false statements; cause and effect;
    arguments

    car repair; a leaking tap; painting a wall; locks and keys; bicycles; batteries; washing machines; vacuum
    cleaners; mobile phones; laptops; printers; email; social media; online shopping; train tickets; hotels;
    airports; luggage; passports; camping gear; weather forecasts; emergency services; fire safety; babysitting;
    pets; aquariums; beekeeping; chickens; sheep; tractors; forests; carpentry; plumbing; electrical wiring;
    concrete; steel; glass; paper; cotton; plastic; gold; oil; salt; sugar; rice; wheat; potatoes
    """.split("\n\n")
    for subject in field.strip().rstrip(";").split(";")
]
LEVELS = (
    "a child of six",
    "a pupil",
    "a teenager",
    "a beginner",
    "a university student",
    "an expert",
    "a busy manager",
    "my grandmother",
    "a nurse",
    "an engineer",
    "a tourist",
    "someone who disagrees",
)
TONES = (
    "formal",
    "friendly",
    "dry",
    "humorous",
    "sad",
    "angry",
    "poetic",
    "very short",
    "careful",
    "enthusiastic",
    "old-fashioned",
    "plain",
    "suspenseful",
    "sarcastic",
)
LANGUAGES = ("Python", "JavaScript", "C", "Java", "SQL", "Bash", "Rust", "HTML", "C++", "Go", "R")
TONGUES = ("Spanish", "French", "German", "Italian", "Portuguese", "Latin", "Dutch")
# {s}, {u} subjects; {l} level; {t} tone; {who}, {other} names; {n}, {m}, {k} numbers; {code}, {tongue} languages.
CHAT = [
    _BREAK.sub("\n", " ".join(form.split()))
    for form in """
    [Explain|Describe|Tell me about] {s}[.| to {l}.| in {n} sentences.| in a {t} way.]
    What [is|are|should I know about] {s}? [|Answer in {n} sentences.|Be brief.|Give an example.]
    Why [is|are] {s} important [|for {u}|to {l}]?
    How [does|do] {s} [work|compare with {u}|relate to {u}]?
    Compare {s} and {u}. [|Use a table.|Give {n} differences.|Which matters more to {l}?]
    Write a [short |long |{t} |][story|fable|tale] about {s}[.| and {u}.| in which {who} meets {other}.]
    Write a {t} poem about {s}. [|{n} lines.|It should rhyme.|No rhymes.]
    Write a haiku about {s}.
    Write a [letter|note|postcard] from {who} to {other} about {s}[.|, in a {t} tone.]
    Write [an email|a formal email|a complaint|an apology] about {s} [to my boss|to a shop|to a neighbour|to a teacher].
    Write a dialogue between {who} and {other} about {s}[.|, {t}.|. {other} knows nothing about it.]
    Write a scene of a play about {s} with {n} characters.
    Make a list of {n} [facts|questions|tips|ideas|mistakes|objects|words|reasons] about {s}.
    Give me {n} [short |][rules|slogans|headlines|titles] for an article about {s}.
    Write a news report about {s} in {who}'s town.
    Write a [product description|advertisement|review] about {s}. [|{t}.|Give {n} stars of 5.]
    Write a recipe that has to do with {s}. [|List the ingredients first.|Number the steps.]
    Write instructions for {s}, step by step, for {l}.
    Write a [speech|toast|sermon] on {s} for {l}.
    Write a diary entry of {who} about {s}.
    Write a paragraph about {s}, then summarise it in one sentence.
    Summarise what is known about {s} in {n} bullet points.
    Argue [for|against] this: {s} should be taught in every school.
    [Is it true that {s} and {u} are connected?|Does {s} have anything to do with {u}?] Say yes or no and why.
    Invent a myth that explains {s}.
    Define these terms: {s}, {u}.
    Write an encyclopedia entry on {s}. [|Use headings.|Use Markdown.]
    Write a FAQ about {s} with {n} questions and answers.
    Write a timeline of {s} with {n} entries.
    Write a table in Markdown with {n} rows about {s}.
    Write a JSON object that describes {s}. [|With {n} keys.]
    Write a CSV file with {n} rows about {s}.
    Write {code} code that has to do with {s}. [|Explain it.|No comments.|With a test.]
    Write a {code} function for {s}[.| and explain each line.| that takes {n} arguments.]
    [What is wrong with|Explain|How do I improve] a typical {code} program about {s}? Show code.
    Write a SQL table and a query about {s}.
    Write a maths word problem about {s} with the numbers {n}, {m} and {k}, then solve it step by step.
    {who} has {m} [coins|books|apples|tickets], gives {n} to {other} and then buys {k} more. How many are left?
    {who} works on {s} for {n} hours a day and is paid ${m} an hour. How much is that in {k} days? Think step by step.
    A [train|car|boat|cyclist] goes {m} kilometres in {n} hours. How far does it go in {k} hours? Explain.
    What is {m} [plus|minus|times|divided by] {k}? [|Show your work.|Then add {n}.]
    Calculate {n} * ({m} + {k}). [|Step by step.]
    A shop sells {s} for ${m} with {n} percent off. {who} buys {k}. What is the price? Explain.
    Write {n} exercises on {s} with answers.
    Write a multiple-choice question about {s} with options A) to [D)|E)], then give the answer and say why.
    Write a quiz with {n} multiple-choice questions about {s}. Give the answers at the end.
    Write a true or false quiz about {s} with {n} items and answers.
    Invent a premise about {s} and a hypothesis. Is it entailed, neutral or a contradiction, and why?
    Write {n} pairs of sentences about {s}. For each say whether the second follows from the first.
    Write a sentence about {who} and {s}, and one that contradicts it. Explain the contradiction.
    Describe a picture of {n} people and {s} in one sentence. Then say what may be true and what cannot be true.
    Invent a logic puzzle about {s} with {n} people and solve it step by step.
    {who} is [taller|older] than {other}, and {other} than {who2}. Who comes [first|last]? Explain.
    {who}, {other} and {who2} sit in a row. Invent {n} clues and work out the order.
    All {s} are useful. Some useful things are rare. Does it follow that some {s} are rare? Reason carefully.
    Invent a riddle about {s} and give its answer.
    If today is day {n} of the month, what date is it in {m} days? Reason step by step.
    Sort these words by alphabet: {s}, {u}, {who}, {other}, {v}.
    Which of these does not belong: {s}, {u}, {v}? Explain.
    How many letters are in "{s}"? Count them.
    Translate into {tongue}: "{who} likes {s}." [|Explain the grammar.]
    Write {n} sentences in {tongue} about {s}, with English translations.
    Rewrite this in a {t} tone: "{who} told {other} about {s} yesterday."
    Correct the grammar: "{who} don't knows nothing of {s} and them was late for {u}."
    What is the past tense of {n} verbs that have to do with {s}?
    Find synonyms for {n} words about {s}.
    Is this positive or negative: "{who} thought {s} was [a waste of time|a delight|fine, though slow]"? Explain.
    Extract names and numbers as JSON: "{who} and {other} bought {m} things for {s} on day {n} and paid ${k}."
    A patient of {m} years asks about {s}. What should a doctor ask and advise?
    What are the symptoms, causes and treatment of [a condition that has to do with {s}|a common disease]? For {l}.
    {who} asks: can {s} be dangerous? Answer as a doctor.
    Act as {l} and explain {s}.
    You are a [travel guide|lawyer|chemist|coach|librarian|cook|detective|teacher]. {who} asks you about {s}. Answer.
    Plan a [day|week|lesson|party|trip] about {s}. [|Make a schedule.|It may cost ${m}.]
    What would happen if there were no {s}?
    Give a pro and a con of {s}, then decide.
    Write a tweet, a headline and a slogan about {s}.
    Give me a metaphor for {s} and explain it.
    Tell a joke about {s}.
    Write a song with a chorus about {s}.
    Write a product manual page about {s} with warnings.
    Write the minutes of a meeting about {s} with {who} and {other}.
    Write a job advert for someone who knows {s}.
    Write a short biography of {who}, who is known for {s}.
    Write an abstract of a scientific paper on {s}[.| and {u}.]
    Write an experiment about {s} with materials, steps and results.
    Write a LaTeX formula that has to do with {s} and explain the symbols.
    Write a regular expression that has to do with {s} and explain it.
    Write a log file of {n} lines from a program about {s}.
    Write a chat between a customer and a support agent about {s}.
    Write a contract clause about {s} and explain it to {l}.
    Write captions for {n} photographs of {s}.
    Complete the analogy: {s} is to {u} as {v} is to what? Explain.
    Give the steps to decide between {s} and {u} if you have {n} hours and ${m}.
    What are common misconceptions about {s}?
    {who} says that {s} causes {u}. {other} disagrees. Who is right?
    """.strip().split("\n")
]
PLAIN = [
    _BREAK.sub("\n", " ".join(form.split()))
    for form in """
    The history of {s} [begins|goes back to|is]
    # {s} // // ## [Introduction|Overview|Chapter {n}] //
    Once upon a time, [there was|{who} found|{who} and {other}]
    {who} [looked up from|thought about|had never understood] {s}
    [Question|Q]: What [is|are] {s}? // [Answer|A]:
    {code} [tutorial|example]: {s} // //
    def [solve|count|find|make]_
    import [os|json|math|random|re] //
    Dear {who}, // // [I am writing about|Thank you for|I was sorry to hear about] {s}
    [Abstract|Summary]. [We study|This paper is about] {s}
    Ingredients for {n} people: //
    Chapter {n}. // //
    {who}: [Have you heard about|What do you think of|I need help with] {s}? // {other}:
    Problem {n}. {who} has {m}
    Multiple choice. {s}: // A)
    In [the news|other news|a study|our town] today, {s}
    - {s} // - {u} // - {v} //
    How to [understand|enjoy|choose|learn about] {s}: // 1.
    The difference between {s} and {u} is
    Patient is a {m}-year-old [man|woman] with
    Review of {s}: [I|We|This]
    According to [experts|the law|legend|{who}], {s}
    | {s} | {u} | // | --- | --- | //
    <h1>{s}</h1> // <p>
    SELECT
    Theorem {n}. //
    [A man|A woman|Two children|A group of people|A dog|{n} people] [is|are]
    """.strip().split("\n")
]
# Of all requests, in percent.
PLAIN_SHARE = 20


def ask(seed: int, i: int) -> tuple[str, str]:
    """The i-th request of a seed: ("chat" or "plain", its text)."""
    d = Draw(f"text|{seed}|{i}")
    s, u, v = d.some(SUBJECTS, 3)
    who, other, who2 = d.some(NAMES, 3)
    kind, forms = ("plain", PLAIN) if d.int(1, 100) <= PLAIN_SHARE else ("chat", CHAT)
    text = d.say(
        d.pick(forms),
        s=s,
        u=u,
        v=v,
        who=who,
        other=other,
        who2=who2,
        l=d.pick(LEVELS),
        t=d.pick(TONES),
        n=d.int(2, 9),
        m=d.int(11, 96),
        k=d.int(3, 40),
        code=d.pick(LANGUAGES),
        tongue=d.pick(TONGUES),
    )
    return kind, text if kind == "plain" else text.strip()
