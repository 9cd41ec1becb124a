//! Unicode: the normal form of a text, when two addresses are one, and what is visible.

use std::borrow::Cow;

use icu_casemap::{CaseMapper, CaseMapperBorrowed};
use icu_normalizer::{
    ComposingNormalizer, ComposingNormalizerBorrowed, DecomposingNormalizer, DecomposingNormalizerBorrowed,
};
use icu_properties::props::DefaultIgnorableCodePoint;
use icu_properties::{CodePointSetData, CodePointSetDataBorrowed};

const COMPOSING: ComposingNormalizerBorrowed<'static> = ComposingNormalizer::new_nfc();
const DECOMPOSING: DecomposingNormalizerBorrowed<'static> = DecomposingNormalizer::new_nfd();
const CASE: CaseMapperBorrowed<'static> = CaseMapper::new();
const IGNORABLE: CodePointSetDataBorrowed<'static> = CodePointSetData::new::<DefaultIgnorableCodePoint>();

/// Has no dots, but is neither white space nor ignorable.
const BLANK_BRAILLE: char = '\u{2800}';

/// Of one character in NFC, the most characters in any other form of it.
pub(crate) const NFC_SHRINKS_MAX: usize = 4;

/// The text in normal form C: the same, however a device composes its characters.
pub(crate) fn nfc(text: &str) -> Cow<'_, str> {
    COMPOSING.normalize(text)
}

/// False for white space, for what is ignored by default where it is not supported (joiners, direction marks, variation
/// selectors, fillers such as U+3164), and for the braille cell without dots.
pub(crate) fn is_visible(character: char) -> bool {
    if character.is_ascii() {
        return !character.is_ascii_whitespace();
    }
    !(character.is_whitespace() || character == BLANK_BRAILLE || IGNORABLE.contains(character))
}

/// What makes an email address unique: its local part as Unicode compares texts without regard to case (definition D145),
/// and its domain in ASCII. Of an address in ASCII it is the lower case.
pub(crate) fn email_key(email: &str) -> String {
    let (local, domain) = email.rsplit_once('@').unwrap_or((email, ""));
    let decomposed = DECOMPOSING.normalize(local);
    let folded = CASE.fold_string(&decomposed);
    // An old address may have a domain that is refused today.
    let domain = ascii_domain(domain).unwrap_or_else(|| domain.to_lowercase());
    format!("{}@{domain}", nfc(&folded))
}

/// The domain as DNS knows it, in lower case. `None` if it has a label that no domain can have.
pub(crate) fn ascii_domain(domain: &str) -> Option<String> {
    idna::domain_to_ascii(domain).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nfc_has_at_least_a_quarter_of_the_characters() {
        let most =
            ('\0'..=char::MAX).map(|c| DECOMPOSING.normalize(c.encode_utf8(&mut [0; 4])).chars().count());
        assert_eq!(most.max(), Some(NFC_SHRINKS_MAX));
    }

    #[test]
    fn the_key_of_an_ascii_address_is_its_lower_case() {
        for email in [
            "Ana@Example.COM",
            "a.B+c@x_y.example",
            "\"A b\"@c.de",
            "ana@XN--BCHER-KVA.example",
            "ana@xn--A.example",
        ] {
            assert_eq!(email_key(email), email.to_ascii_lowercase());
        }
    }

    #[test]
    fn folding_a_key_again_changes_nothing() {
        // The last two have U+0345, whose fold is a letter: its place depends on the marks around it.
        for local in ["ΑΣ", "İ", "ŉ", "\u{1e9e}", "\u{3b1}\u{345}\u{301}", "\u{1fb3}\u{301}"] {
            let key = email_key(&format!("{local}@example.com"));
            assert_eq!(email_key(&key), key, "{local}");
        }
        assert_eq!(email_key("\u{3b1}\u{345}\u{301}@x.y"), email_key("\u{1fb3}\u{301}@x.y"));
    }

    #[test]
    fn what_shows_nothing_is_not_visible() {
        for visible in "aä🦀!\u{301}\u{7f}\u{9b}\u{fffd}\u{fffc}\u{2801}\u{1f3ff}".chars() {
            assert!(is_visible(visible), "{visible:?}");
        }
        let nothing = " \t\u{a0}\u{2003}\u{2800}\u{3164}\u{115f}\u{ffa0}\u{ad}\u{200b}\u{200d}\u{202e}\u{2066}\u{fe0f}\u{feff}\
                       \u{e0001}\u{e0100}\u{e0fff}";
        for invisible in nothing.chars() {
            assert!(!is_visible(invisible), "{invisible:?}");
        }
    }
}
