//! Words for columns and for yes and no.

/// Names of the column of image files.
pub(crate) const PATH_COLUMNS: [&str; 16] = [
    "file",
    "path",
    "file_name",
    "file_path",
    "image",
    "image_path",
    "image_file",
    "image_name",
    "image_id",
    "img",
    "img_path",
    "img_file",
    "img_name",
    "src",
    "name_id",
    "picture",
];
/// Names of the column that says whether two images show one person.
pub(crate) const SAME_COLUMNS: [&str; 10] =
    ["is_same", "same", "same_person", "label", "match", "is_match", "genuine", "is_genuine", "target", "decision"];
/// Names that mean the same only if there is none of [`SAME_COLUMNS`].
pub(crate) const MAYBE_SAME_COLUMNS: [&str; 4] = ["actual", "type", "y", "gt"];

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

/// Returns the places of the columns that have one of these names, in any case and with or without underscores.
pub(crate) fn columns_named<T: AsRef<str>>(columns: &[T], names: &[&str]) -> Vec<usize> {
    let wanted: Vec<String> = names.iter().map(|name| column_name(name)).collect();
    (0..columns.len()).filter(|&i| wanted.contains(&column_name(columns[i].as_ref()))).collect()
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
        assert_eq!(columns_named(&["Label", "File Name", "x", "IsSame"], &SAME_COLUMNS), [0, 3]);
        assert_eq!(columns_named(&["Label", "File Name", "x"], &PATH_COLUMNS), [1]);
    }
}
