//! The forms of a line of a list of pairs.

use super::entry::{ImageId, PairEntry};
use crate::data::decode::names_image;
use crate::error::Result;
use crate::lists::{
    Line, MAYBE_SAME_COLUMNS, SAME_COLUMNS, Separator, Text, column_name, columns_named, quoted, truth, whole,
};

/// What a list may look like.
const KNOWN: &str = "expected LFW's or MFR2's pairs (\"name i j\" or \"name1 i name2 j\"), \"path path 1\", or columns \
                     such as image1,image2,same or name,imagenum1,imagenum2";

/// What the fields of a line are.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Form {
    /// `name i j`, or `name1 i name2 j`, perhaps with a field that says whether both are one person.
    Names { same: Option<usize> },
    /// Two paths and a flag at these places of so many fields, and the fold if the list names it.
    Files { a: usize, b: usize, same: usize, fold: Option<usize>, num_fields: usize },
    /// Two paths with blanks, and a flag before or after them.
    FilesBetweenBlanks,
}

impl Form {
    /// Recognises a list's form by its first lines. Returns the form, the separator, and the number of lines to skip.
    pub fn of(text: &Text) -> Result<(Self, Separator, usize)> {
        let mut lines = text.lines();
        let Some(first) = lines.next() else {
            return Err(text.error(1, format!("{KNOWN}; found an empty file")));
        };
        let second = lines.next();
        let mut problem = None;
        for separator in Separator::of(first) {
            match Self::by(first, second, separator) {
                Ok(Some((form, has_names))) => return Ok((form, separator, usize::from(has_names))),
                Ok(None) => {}
                Err(what) => problem = problem.or(Some(what)),
            }
        }
        let what = problem.unwrap_or_else(|| format!("{KNOWN}; found {}", first.quoted()));
        Err(text.error(first.number, what))
    }

    /// Returns the form with this separator and whether the first line is one of column names; none if it has none.
    fn by(
        first: Line,
        second: Option<Line>,
        separator: Separator,
    ) -> std::result::Result<Option<(Self, bool)>, String> {
        let fields = first.fields(separator)?;
        let names: Vec<String> = fields.iter().map(|field| column_name(field)).collect();
        let is_data = |field: &str| field.parse::<f64>().is_ok() || names_image(field) || field.contains(['/', '\\']);
        if !fields.iter().any(|field| is_data(field)) {
            let same = [&SAME_COLUMNS[..], &MAYBE_SAME_COLUMNS].map(|names| columns_named(&fields, names));
            let same = same.into_iter().find(|found| !found.is_empty()).unwrap_or_default();
            if names.iter().any(|name| name.starts_with("imagenum")) {
                return Ok(Some((Self::Names { same: same.first().copied() }, true)));
            }
            let &[same] = &same[..] else {
                let found = quoted(&fields.join(", "));
                let what = if same.is_empty() { KNOWN.to_owned() } else { "expected one column same".to_owned() };
                return Err(format!("{what}; found {found}"));
            };
            let Some(second) = second else {
                return Err("expected pairs after the column names, found none".to_owned());
            };
            let sample = second.fields(separator)?;
            let images: Vec<usize> = (0..sample.len()).filter(|&i| i != same && names_image(&sample[i])).collect();
            let &[a, b] = &images[..] else {
                let num = images.len();
                return Err(format!("expected two columns of image files, found {num} in {}", second.quoted()));
            };
            let fold = names.iter().position(|name| name == "fold");
            return Ok(Some((Self::Files { a, b, same, fold, num_fields: fields.len() }, true)));
        }
        if separator == Separator::Blanks && fields.iter().any(|field| names_image(field)) {
            return Ok(files_between_blanks(first).is_ok().then_some((Self::FilesBetweenBlanks, false)));
        }
        let images: Vec<usize> = (0..fields.len()).filter(|&i| names_image(&fields[i])).collect();
        let has_flag = |i: usize| fields.get(i).is_some_and(|field| truth(field).is_some());
        let files = |a, b, same| Some((Self::Files { a, b, same, fold: None, num_fields: 3 }, false));
        Ok(match (trimmed(&fields).len(), &images[..]) {
            (3, [0, 1]) if has_flag(2) => files(0, 1, 2),
            (3, [1, 2]) if has_flag(0) => files(1, 2, 0),
            (2, [0, 1]) => {
                return Err("expected whether both show one person, 1 or 0, found two files alone".to_owned());
            }
            (3.., []) if Self::Names { same: None }.entry(&trimmed(&fields), 1).is_ok() => {
                Some((Self::Names { same: None }, false))
            }
            _ => None,
        })
    }

    /// Reads a line.
    ///
    /// # Errors
    /// Says what was expected and found.
    pub fn read(&self, line: Line, separator: Separator) -> std::result::Result<PairEntry, String> {
        if *self == Self::FilesBetweenBlanks {
            return files_between_blanks(line);
        }
        let fields = line.fields(separator)?;
        let fields: Vec<&str> = fields.iter().map(|field| &**field).collect();
        self.entry(&fields, line.number).map_err(|what| format!("{what}, found {}", line.quoted()))
    }

    /// Reads the fields of a line.
    pub fn entry(&self, fields: &[&str], line: usize) -> std::result::Result<PairEntry, String> {
        match *self {
            Self::Names { same } => names(fields, same, line),
            Self::Files { a, b, same, fold, num_fields } => {
                let is_empty = |from: usize| fields[from..].iter().all(|field| field.is_empty());
                if fields.len() < num_fields || !is_empty(num_fields) {
                    return Err(format!("expected {num_fields} fields, found {}", fields.len()));
                }
                let field = |at: usize| fields.get(at).copied().ok_or(format!("expected field {}", at + 1));
                let is_same = truth(field(same)?).ok_or("expected 1 or 0 for whether both show one person")?;
                let fold = match fold {
                    Some(at) => field(at)?.parse().map_err(|_| "expected the number of a fold".to_owned())?,
                    None => 0,
                };
                let file = |at| Ok::<_, String>(ImageId::File(path(field(at)?)?));
                Ok(PairEntry { a: file(a)?, b: file(b)?, is_same, fold, line })
            }
            Self::FilesBetweenBlanks => Err("expected two files".to_owned()),
        }
    }
}

/// Fields without empty ones at the end.
fn trimmed<'a>(fields: &'a [std::borrow::Cow<str>]) -> Vec<&'a str> {
    let mut fields: Vec<&str> = fields.iter().map(|field| &**field).collect();
    while fields.last().is_some_and(|field| field.is_empty()) {
        fields.pop();
    }
    fields
}

/// Reads `name i j` or `name1 i name2 j`; `same` is the place of a field that says whether both are one person.
fn names(fields: &[&str], same: Option<usize>, line: usize) -> std::result::Result<PairEntry, String> {
    let mut fields = fields.to_vec();
    let flag = match same.filter(|&at| at < fields.len()) {
        Some(at) => {
            let field = fields.remove(at);
            Some(truth(field).ok_or_else(|| format!("expected 1 or 0, found {field:?}"))?)
        }
        None => None,
    };
    while fields.last().is_some_and(|field| field.is_empty()) {
        fields.pop();
    }
    let (a, i, b, j) = match *fields {
        [name, i, j] => (name, i, name, j),
        [a, i, b, j] => (a, i, b, j),
        _ => {
            let hint = if fields.len() > 4 { "; between names with blanks there must be tabs" } else { "" };
            return Err(format!("expected \"name i j\" or \"name1 i name2 j\"{hint}"));
        }
    };
    let is_same = a == b;
    if flag.is_some_and(|flag| flag != is_same) {
        return Err(format!("expected a flag that agrees with the names {a} and {b}"));
    }
    let id = |name: &str, number: &str| {
        let number = whole(number).and_then(|number| u32::try_from(number).ok());
        let number = number.ok_or_else(|| format!("expected whole numbers of images, such as \"{name} 1 2\""))?;
        Ok::<_, String>(ImageId::Numbered { identity: name.to_owned(), number })
    };
    Ok(PairEntry { a: id(a, i)?, b: id(b, j)?, is_same, fold: 0, line })
}

fn path(text: &str) -> std::result::Result<String, String> {
    match names_image(text) {
        true => Ok(text.to_owned()),
        false => Err(format!("expected an image file, found {}", quoted(text))),
    }
}

/// Reads two paths, which may have blanks, and a flag before or after them.
fn files_between_blanks(line: Line) -> std::result::Result<PairEntry, String> {
    let expected = || format!("expected two image files and 1 or 0, found {}", line.quoted());
    let text = line.text.trim();
    let (before, files) = match text.split_once(char::is_whitespace) {
        Some((first, rest)) if !names_image(first) && truth(first).is_some() => (Some(first), rest),
        _ => (None, text),
    };
    let ends: Vec<usize> = files
        .split_whitespace()
        .filter(|token| names_image(token))
        .map(|token| token.as_ptr() as usize - files.as_ptr() as usize + token.len())
        .collect();
    let &[first, second] = &ends[..] else { return Err(expected()) };
    let after = files[second..].trim();
    let flag = match (before, after) {
        (Some(flag), "") | (None, flag) => truth(flag).ok_or_else(expected)?,
        (Some(_), _) => return Err(expected()),
    };
    let [a, b] = [&files[..first], &files[first..second]].map(|path| ImageId::File(path.trim().to_owned()));
    Ok(PairEntry { a, b, is_same: flag, fold: 0, line: line.number })
}
