"""The language of a text by its most frequent words: deterministic, without a model or a package.

Every language has words that make up a third of any text ("the", "of", "and"). A text is of the language whose words
are most of it, if they are at least a tenth and clearly more than those of the next one; other languages than
these twelve, other scripts and code are None. Meant for long documents: below about 50 words it is a guess.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W\d_]+")
_STRETCHES = 5
_STRETCH_CHARACTERS = 4000
_SHARE = 0.1
_LEAD = 1.3

PROFILES: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to in a is that for it as was with be by on not he his but at are this have from "
        "or had which an they you were her she their there been we has would all when who will more "
        "if no out so what said",
        "de": "der die und das in den von zu mit sich auf f\u00fcr ist im dem nicht ein eine als auch es an "
        "werden aus er hat dass sie nach wird bei einer um am sind noch wie einem \u00fcber einen so "
        "zum war haben nur oder aber",
        "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il "
        "sont avec la \u00e0 ou son mais comme nous elle cette ces aux on leur \u00e9tait aussi sa "
        "sans lui",
        "es": "de la que el en y a los se del las un por con no una su para es al lo como m\u00e1s o pero "
        "sus le ha me si sin sobre este ya entre cuando todo esta ser son dos tambi\u00e9n fue "
        "hab\u00eda era muy",
        "it": "di e il la che in un a per \u00e8 una sono non del con da si le dei nel come al pi\u00f9 i "
        "della gli ma alla delle anche lo su o se questo cui essere era ha suo dal nella",
        "pt": "de a o que e do da em um para com n\u00e3o uma os no se na por mais as dos como mas ao ele "
        "das \u00e0 seu sua ou quando muito nos j\u00e1 eu tamb\u00e9m s\u00f3 pelo pela at\u00e9 "
        "isso foi",
        "nl": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan maar bij uit nog "
        "door naar heeft hij ze wordt tot je werd worden deze over had geen",
        "sv": "och i att det som en p\u00e5 \u00e4r av f\u00f6r med den till inte har de ett om han men var "
        "jag fr\u00e5n vi s\u00e5 kan n\u00e4r hade ska sin",
        "da": "og i at det er en til af p\u00e5 for med den som der de ikke et har var jeg han men fra om "
        "vi s\u00e5 kan skal blev efter",
        "pl": "w i z na do nie si\u0119 to \u017ce jest o jak od przez po za ale tak ju\u017c dla co czy "
        "tylko jego by\u0142 ich przy kt\u00f3ry kt\u00f3re",
        "ru": "\u0438 \u0432 \u043d\u0435 \u043d\u0430 \u0447\u0442\u043e \u0441 \u043a\u0430\u043a "
        "\u043f\u043e \u043d\u043e \u043e\u043d \u043a \u0438\u0437 \u0443 \u044d\u0442\u043e "
        "\u0437\u0430 \u0442\u043e \u043e\u0442 \u0434\u043b\u044f \u0442\u0430\u043a \u0436\u0435 "
        "\u0431\u044b\u043b \u0435\u0433\u043e \u0430 \u044f",
        "tr": "ve bir bu da de i\u00e7in ile olarak daha \u00e7ok gibi olan sonra kadar en ne ama o var her "
        "ki",
    }.items()
}


_ENGLISH_FUNCTION_WORDS = (
    "about above across after again against almost alone along already also although always among another anything "
    "anyone around away because become been before behind being below beneath beside besides better between beyond "
    "both came cannot come could does doing done down during each either else enough even ever every everyone "
    "everything except from further gave give given gone have having hence here hers herself himself however "
    "indeed inside instead into itself just keep kept knew know last later least less made make many maybe might "
    "mine more moreover most much must myself near nearly neither never nevertheless next nobody none nothing "
    "nowhere often once only onto other others otherwise ought ours ourselves over perhaps quite rather really "
    "said same says seem seemed seems several shall should since some somebody someone something sometimes "
    "somewhere soon still such sure take taken than that their theirs them themselves then there therefore these "
    "they this those though through throughout thus together told took toward towards under unless until unto "
    "upon used using very went were what whatever when whenever where wherever whereas whether which while "
    "whoever whole whom whose will with within without would your yours yourself yourselves thee thine thou "
    "hath doth shalt wherefore whence thither hither thereof therein herein hereby thereby "
    "the a an and but for nor not or so yet as at by in of off on out to up if is are was be it its he she we you "
    "i his her our my me him us who how why all any no now then one two first second see note"
)
FUNCTION_WORDS: frozenset[str] = frozenset(_ENGLISH_FUNCTION_WORDS.split()).union(*PROFILES.values())
"""Words of every text, in all the languages: nobody asks what they stand for."""


def detect_language(text: str) -> str | None:
    """Return the code of the text's language, None for one that is not known here; looks at 20,000 characters."""
    words = [word.lower() for stretch in _stretches(text) for word in _WORD.findall(stretch)]
    if not words:
        return None
    shares = sorted(
        (
            (sum(word in profile for word in words) / len(words), language)
            for language, profile in PROFILES.items()
        ),
        reverse=True,
    )
    (best, language), (second, _) = shares[0], shares[1]
    return language if best >= _SHARE and best >= _LEAD * second else None


def _stretches(text: str) -> list[str]:
    """Return pieces evenly spaced over the text: the first page of a book may be a licence in another language."""
    if len(text) <= _STRETCHES * _STRETCH_CHARACTERS:
        return [text]
    step = (len(text) - _STRETCH_CHARACTERS) / (_STRETCHES - 1)
    return [text[round(number * step) :][:_STRETCH_CHARACTERS] for number in range(_STRETCHES)]
