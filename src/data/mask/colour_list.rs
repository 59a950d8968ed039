//! Mask colours that the published evaluation drew once for a test set and has read from files since.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};

/// Reads the colours of images from lines `NUMBER,[RED GREEN BLUE]`. Images are numbered from 0 as in a verification
/// file, two per pair.
///
/// # Errors
/// When the file cannot be read, a line is malformed, or an image is listed twice.
pub fn read_colours(path: &Path) -> Result<BTreeMap<usize, [u8; 3]>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mut colours = BTreeMap::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: &str| {
            Err(Error::Line { path: path.to_owned(), line: i + 1, what: format!("{what}, found {line:?}") })
        };
        let parsed = line.split_once(',').and_then(|(number, rest)| {
            let inside = rest.trim().strip_prefix('[')?.strip_suffix(']')?;
            let values =
                inside.split_ascii_whitespace().map(|value| value.parse().ok()).collect::<Option<Vec<u8>>>()?;
            Some((number.trim().parse::<usize>().ok()?, <[u8; 3]>::try_from(values).ok()?))
        });
        let Some((number, colour)) = parsed else { return wrong("expected NUMBER,[RED GREEN BLUE]") };
        if colours.insert(number, colour).is_some() {
            return wrong("expected each image once");
        }
    }
    Ok(colours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_read_by_their_image_and_wrong_lines_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lfw_both_True.txt");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_colours(&path)
        };
        // NumPy pads the numbers of an array.
        let colours = read("0,[ 12 149   0]\n1,[1 2 3]\n\n").unwrap();
        assert_eq!(colours.into_iter().collect::<Vec<_>>(), [(0, [12, 149, 0]), (1, [1, 2, 3])]);
        for wrong in ["0,[1 2]", "0 [1 2 3]", "x,[1 2 3]", "0,[1 2 300]", "0,1 2 3"] {
            let error = read(&format!("5,[1 2 3]\n{wrong}\n")).unwrap_err().to_string();
            assert!(error.contains(":2: expected NUMBER,[RED GREEN BLUE]"), "{error}");
        }
        assert!(read("1,[1 2 3]\n1,[1 2 3]\n").unwrap_err().to_string().contains("each image once"));
    }
}
