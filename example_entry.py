"""The data format by example: one dialog, as it stands in the lists of a dataset file.

A dataset is a JSON object `{"train": [dialog, ...], "valid": [dialog, ...]}`; either of the two may be left out. A
dialog is an object like `EXAMPLE_ENTRY`, always told from the side of the one whose replies are learnt, "the speaker":

* `personality`: a list of sentences that the speaker holds true of itself. May be empty or left out.
* `utterances`: one object for each reply of the speaker, in the order of the conversation. At least one.
    * `history`: everything said before this reply, oldest first, both sides in turn. Its last text is what the reply
      answers, so the partner said it. Each utterance repeats the whole history: it stands on its own. May be empty
      or left out when the speaker opens the dialog.
    * `candidates`: texts to choose the reply from. The LAST one is the reply that was really given, the gold; the
      others are distractors, replies from other dialogs that do not fit here. Their number may differ from utterance
      to utterance. PersonaChat has 19 distractors; here are 3 to keep the example short.
    * `reply`: the gold alone, for data without distractors: it stands in place of `candidates`, and distractors are
      then drawn from the replies of the other dialogs.

Texts are plain strings and are taken as they stand, so neither lower case nor spaces around punctuation are needed.
Other fields are ignored. Nothing here is needed to train: the dialog is only read, by people and by a test.
"""

EXAMPLE_ENTRY = {
    "personality": [
        "I keep bees on the roof of my house.",
        "I play the cello in a small orchestra.",
        "My brother lives in Norway.",
        "I can't stand the heat.",
    ],
    "utterances": [
        {
            "candidates": [
                "No, I have never owned a boat.",
                "Three cats and a parrot, they fight all day!",
                "I mostly teach maths, and some physics.",
                "Hello! A bit tired, we rehearsed until late last night. And you?",
            ],
            "history": ["Hi there, how are you today?"],
        },
        {
            "candidates": [
                "My car broke down again, so I walked.",
                "Congratulations, when is the wedding?",
                "I would choose the blue one.",
                "The cello. We are only twelve people, but we love it. Do you play anything?",
            ],
            "history": [
                "Hi there, how are you today?",
                "Hello! A bit tired, we rehearsed until late last night. And you?",
                "I'm fine, thanks. What do you play?",
            ],
        },
        {
            "candidates": [
                "She is a nurse in the children's ward.",
                "Pizza, every single Friday.",
                "I was born in a village by the sea.",
                "Far too hot for me. At least my bees up on the roof enjoy it.",
            ],
            "history": [
                "Hi there, how are you today?",
                "Hello! A bit tired, we rehearsed until late last night. And you?",
                "I'm fine, thanks. What do you play?",
                "The cello. We are only twelve people, but we love it. Do you play anything?",
                "Only the radio, in the garden. It's lovely and warm out here!",
            ],
        },
    ],
}
