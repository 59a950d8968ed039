//! Text lists as people have them: one reader of lines and fields, and one set of words for columns and for yes and no.

mod paths;
mod table;
mod words;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

pub(crate) use paths::{person_and_file, plain_path};
pub(crate) use table::{Row, Table};
pub(crate) use words::{MAYBE_SAME_COLUMNS, PATH_COLUMNS, SAME_COLUMNS, column_name, columns_named, truth};

use crate::error::{Error, Result};

/// Characters of a list's text that an error quotes.
const MAX_QUOTED: usize = 80;

/// The lines of a text file that are not blank.
#[derive(Debug)]
pub(crate) struct Text {
    path: PathBuf,
    text: String,
}

impl Text {
    /// Reads a file of UTF-8, with or without a byte-order mark, or of UTF-16 with one.
    ///
    /// # Errors
    /// When it cannot be read or is not text.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let wrong = |offset: usize, what: &str| Error::Format {
            path: path.to_owned(),
            offset: offset as u64,
            what: format!("expected UTF-8 text, {what}"),
        };
        let text = match &bytes[..] {
            [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
            [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
            _ => Ok(String::from_utf8(bytes).map_err(|e| {
                let at = e.utf8_error().valid_up_to();
                wrong(at, "found other bytes")
            })?),
        };
        let text = text.map_err(|what| wrong(0, what))?;
        if let Some(at) = text.find('\0') {
            return Err(wrong(at, "found a zero byte"));
        }
        // Old Macs and some spreadsheets end lines with a carriage return alone.
        let text = if text.contains('\n') { text } else { text.replace('\r', "\n") };
        Ok(Self { path: path.to_owned(), text })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the lines that are neither blank nor comments, which start with `# `, with their numbers from 1.
    pub fn lines(&self) -> impl Iterator<Item = Line<'_>> + Clone {
        let text = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        let lines = text.lines().zip(1..).map(|(text, number)| Line { text: text.trim_end_matches('\r'), number });
        lines.filter(|line| !line.text.trim().is_empty() && !line.text.starts_with("# "))
    }

    /// Number of all lines.
    pub fn num_lines(&self) -> usize {
        self.text.lines().count()
    }

    /// Returns an error about a line.
    pub fn error(&self, line: usize, what: String) -> Error {
        Error::Line { path: self.path.clone(), line, what }
    }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> std::result::Result<String, &'static str> {
    if !bytes.len().is_multiple_of(2) {
        return Err("found half a unit of UTF-16 at the end");
    }
    let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).collect();
    String::from_utf16(&units).map_err(|_| "found broken UTF-16")
}

/// A line of a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line<'a> {
    pub text: &'a str,
    pub number: usize,
}

impl<'a> Line<'a> {
    /// Splits the line; fields are trimmed, and quotes around a field are taken off.
    ///
    /// # Errors
    /// When a quote is not closed.
    pub fn fields(&self, separator: Separator) -> std::result::Result<Vec<Cow<'a, str>>, String> {
        let delimiter = match separator {
            Separator::Blanks if !self.text.contains('"') => {
                return Ok(self.text.split_whitespace().map(Cow::Borrowed).collect());
            }
            Separator::Blanks => ' ',
            Separator::Tab => '\t',
            Separator::Comma => ',',
            Separator::Semicolon => ';',
        };
        if !self.text.contains('"') {
            return Ok(self.text.split(delimiter).map(|field| Cow::Borrowed(field.trim())).collect());
        }
        // One line at a time: a quote that is left open must not swallow the lines that follow.
        if !self.text.matches('"').count().is_multiple_of(2) {
            return Err(format!("expected every quote to be closed in its line, found {}", self.quoted()));
        }
        let mut reader = csv::ReaderBuilder::new();
        reader.has_headers(false).delimiter(delimiter as u8).trim(csv::Trim::All);
        let record = reader.from_reader(self.text.as_bytes()).into_records().next();
        let record = record.transpose().map_err(|e| e.to_string())?.unwrap_or_default();
        let fields = record.iter().filter(|field| separator != Separator::Blanks || !field.is_empty());
        Ok(fields.map(|field| Cow::Owned(field.to_owned())).collect())
    }

    /// The line for an error message, cut if it is long.
    pub fn quoted(&self) -> String {
        quoted(self.text)
    }
}

/// Quotes a text for an error message, cut if it is long.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{:?} ...", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// What stands between the fields of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Separator {
    Tab,
    Comma,
    Semicolon,
    /// Any number of blanks and tabs.
    Blanks,
}

impl Separator {
    /// Returns the separators that a line may have, the likeliest first: those in it, outside quotes.
    pub fn of(line: Line) -> Vec<Self> {
        let mut is_quoted = false;
        let outside: String = line
            .text
            .trim()
            .chars()
            .filter(|&c| {
                is_quoted ^= c == '"';
                !is_quoted
            })
            .collect();
        let kinds = [(Self::Tab, '\t'), (Self::Comma, ','), (Self::Semicolon, ';')];
        let found = kinds.into_iter().filter(|(_, sign)| outside.contains(*sign)).map(|(kind, _)| kind);
        found.chain([Self::Blanks]).collect()
    }
}

/// Returns the value of a whole number, also if it is written as a float, such as `3.0`.
pub(crate) fn whole(text: &str) -> Option<i64> {
    let digits = match text.split_once('.') {
        Some((digits, zeros)) if !zeros.is_empty() && zeros.bytes().all(|b| b == b'0') => digits,
        Some(_) => return None,
        None => text,
    };
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str, separator: Separator) -> Vec<String> {
        let line = Line { text, number: 1 };
        line.fields(separator).unwrap().into_iter().map(Cow::into_owned).collect()
    }

    #[test]
    fn fields_are_those_of_their_separator() {
        assert_eq!(fields(r#""Doe, Jane/1.jpg", 7 ,"a ""b""""#, Separator::Comma), ["Doe, Jane/1.jpg", "7", "a \"b\""]);
        assert_eq!(fields("a b\t c ", Separator::Tab), ["a b", "c"]);
        assert_eq!(fields(" a  b\tc", Separator::Blanks), ["a", "b", "c"]);
        assert_eq!(fields("\"a b\"  c", Separator::Blanks), ["a b", "c"]);
        assert_eq!(fields("a;;b", Separator::Semicolon), ["a", "", "b"]);
        let open = Line { text: "a,\"b", number: 1 }.fields(Separator::Comma).unwrap_err();
        assert!(open.contains("every quote to be closed"), "{open}");
        let of = |text| Separator::of(Line { text, number: 1 });
        assert_eq!(of("\"a,b\"\tc"), [Separator::Tab, Separator::Blanks]);
        assert_eq!(of("a,b c"), [Separator::Comma, Separator::Blanks]);
    }

    #[test]
    fn every_encoding_of_a_text_has_the_same_lines() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("list.txt");
        let units = |swap: bool| -> Vec<u8> {
            let units = "\u{feff}ä,1\r\n\r\nb,2\r\n".encode_utf16();
            units.flat_map(|unit| if swap { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
        };
        let files = ["ä,1\n\nb,2", "\u{feff}ä,1\r\n\r\nb,2\r\n", "ä,1\r\rb,2\r"].map(|text| text.as_bytes().to_vec());
        for bytes in files.into_iter().chain([units(false), units(true)]) {
            std::fs::write(&path, bytes).unwrap();
            let text = Text::read(&path).unwrap();
            let lines: Vec<(&str, usize)> = text.lines().map(|line| (line.text, line.number)).collect();
            assert_eq!(lines, [("ä,1", 1), ("b,2", 3)]);
        }
        for (bytes, offset) in [(&b"ab\xff"[..], 2), (b"a\0b", 1), (b"\xff\xfea\0b", 0)] {
            std::fs::write(&path, bytes).unwrap();
            let error = Text::read(&path).unwrap_err();
            assert!(matches!(error, Error::Format { offset: at, .. } if at == offset), "{error}");
        }
    }

    #[test]
    fn whole_numbers_may_look_like_floats() {
        for (text, value) in [
            ("7", Some(7)),
            ("-1", Some(-1)),
            ("3.000", Some(3)),
            ("3.5", None),
            ("3.", None),
            ("a", None),
            ("1e3", None),
        ] {
            assert_eq!(whole(text), value, "{text}");
        }
    }
}
