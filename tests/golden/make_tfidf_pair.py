"""Makes tfidf_pair.json: cosines of scikit-learn's TfidfVectorizer, refitted on {document} ∪ gold
documents for every document.

python tests/golden/make_tfidf_pair.py        (needs scikit-learn; texts and cases follow from the
seed)
"""

import json
import pathlib
import random

from sklearn.feature_extraction.text import TfidfVectorizer

SUBJECTS = [
    "The harbour of Veld",
    "Mara Olin",
    "A 1904 railway",
    "São Bento's mill",
    "Dr. K. Ōta",
    "the X-12 glider",
]
VERBS = [
    "was built by",
    "was_named after",
    "lies near",
    "won't outlast",
    "studied under",
    "is older than",
]
OBJECTS = [
    "the lighthouse",
    "Tomas Reyes",
    "a glass factory",
    "I",
    "two rivers and two bridges",
    "naïve café owners in Lyon",
]


def main() -> None:
    rng = random.Random(0)
    texts = [
        " ".join(
            f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}."
            for _ in range(rng.randint(1, 6))
        )
        for _ in range(40)
    ]
    cases = []
    for n in (1, 2, 3, 4) * 8:
        gold, docs = rng.sample(range(len(texts)), n), rng.sample(range(len(texts)), 4)
        columns = []
        for doc in docs:
            matrix = (
                TfidfVectorizer().fit_transform([texts[doc], *(texts[i] for i in gold)]).toarray()
            )
            columns.append(matrix[1:] @ matrix[0])
        cases.append(
            {
                "gold": gold,
                "docs": docs,
                "cosines": [[round(float(c[i]), 9) for c in columns] for i in range(n)],
            }
        )
    path = pathlib.Path(__file__).with_name("tfidf_pair.json")
    path.write_text(
        json.dumps({"texts": texts, "cases": cases}, ensure_ascii=False, separators=(",", ":"))
        + "\n"
    )


if __name__ == "__main__":
    main()
