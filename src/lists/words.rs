//! Words for columns and for yes and no.

const TRUE: [&str; 12] =
    ["1", "1.0", "true", "t", "yes", "y", "same", "genuine", "match", "matched", "positive", "mated"];
const FALSE: [&str; 15] = [
    "0",
    "0.0",
    "-1",
    "-1.0",
    "false",
    "f",
    "no",
    "n",
    "different",
    "diff",
    "impostor",
    "imposter",
    "mismatch",
    "negative",
    "nonmated",
];

/// Returns whether a field says yes or no, in any case: `1`, `1.0`, `true`, `yes`, `same`, `genuine`, `match` and the
/// like, or `0`, `-1`, `false`, `no`, `different`, `impostor`, `mismatch`; none if it says neither.
pub(crate) fn truth(text: &str) -> Option<bool> {
    let word = text.trim().to_lowercase();
    match (TRUE.contains(&word.as_str()), FALSE.contains(&word.as_str())) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    }
}

/// Returns the name of a column without case, blanks, hyphens, dots and underscores: `is_same` and `Is Same` are one.
pub(crate) fn column_name(text: &str) -> String {
    text.chars().filter(|c| !matches!(c, ' ' | '_' | '-' | '.')).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_true_or_false_or_neither() {
        for word in ["1", "1.0", "True", "YES", "same", "Genuine", " match "] {
            assert_eq!(truth(word), Some(true), "{word}");
        }
        for word in ["0", "0.0", "-1", "FALSE", "different", "impostor"] {
            assert_eq!(truth(word), Some(false), "{word}");
        }
        for word in ["", "2", "0.5", "maybe", "samee"] {
            assert_eq!(truth(word), None, "{word}");
        }
        assert_eq!(column_name("Is-Same "), "issame");
    }
}
