//! Which fields of a list's lines are an image's path and its label.

use std::borrow::Cow;
use std::path::Path;

use crate::data::decode::{is_image, names_image};
use crate::error::Result;
use crate::lists::{Line, PATH_COLUMNS, Separator, Text, columns_named, quoted, whole};

/// Names of the column of labels; of several, the first in this order counts.
const LABEL_COLUMNS: [&str; 13] = [
    "label",
    "labels",
    "classid",
    "class",
    "identity",
    "identityid",
    "personid",
    "person",
    "subjectid",
    "subject",
    "target",
    "id",
    "name",
];
/// What a list may look like.
const KNOWN: &str = "expected column names such as path,label, or a path and a label between which there is a tab, a \
                     comma or a blank, or MXNet's or insightface's .lst";
/// What to do with a list of pairs.
const PAIRS: &str = "a list of pairs is given as --pairs";

/// The form of a list.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Form {
    /// The fields at these places of lines with this number of fields, or any number that has these places.
    Fields { separator: Separator, path: usize, label: Label, num_fields: Option<usize> },
    /// A path, which may have blanks, and the rest of the line, either way round.
    Blanks { label_first: bool },
}

/// Where the label is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Label {
    Field(usize),
    /// The name of the image's folder.
    Folder,
}

/// A form, and whether the first line is one of column names.
type Found = (Form, bool);

impl Form {
    /// Returns a list's form, recognised by its first line, and the number of lines to skip; `exists` tells whether an
    /// image is there.
    ///
    /// # Errors
    /// When the list is empty, or its first line is of no form that is known.
    pub fn of(text: &Text, exists: &dyn Fn(&str) -> bool) -> Result<(Self, usize)> {
        let mut lines = text.lines();
        let Some(mut first) = lines.next() else {
            return Err(text.error(1, format!("{KNOWN}; found an empty file")));
        };
        let mut num_skipped = 0;
        // A single number is the count of the lines that follow.
        if let Ok(count) = first.text.trim().parse::<usize>() {
            let num = lines.clone().count();
            let Some(next) = lines.next().filter(|_| num == count) else {
                return Err(text.error(first.number, format!("expected {count} lines to follow, found {num}")));
            };
            (first, num_skipped) = (next, 1);
        }
        let mut problem = None;
        let mut plausible: Option<Found> = None;
        for separator in Separator::of(first) {
            let found = match Self::by(first, separator) {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(what) => {
                    problem = problem.or(Some(what));
                    continue;
                }
            };
            // In a list with column names the second line tells.
            let sample = if found.1 { lines.clone().next() } else { Some(first) };
            let is_there = sample.is_none_or(|line| found.0.read(line).is_ok_and(|(path, _)| exists(&path)));
            if is_there {
                plausible = Some(found);
                break;
            }
            plausible = plausible.or(Some(found));
        }
        match (plausible, problem) {
            (Some((form, has_names)), _) => Ok((form, num_skipped + usize::from(has_names))),
            (None, Some(what)) => Err(text.error(first.number, what)),
            (None, None) => Err(text.error(first.number, format!("{KNOWN}; found {}", first.quoted()))),
        }
    }

    /// Returns the form of a first line with this separator; none if it has none.
    fn by(line: Line, separator: Separator) -> std::result::Result<Option<Found>, String> {
        let mut fields = line.fields(separator)?;
        while fields.len() > 1 && fields.last().is_some_and(|field| field.is_empty()) && !is_header(&fields) {
            fields.pop();
        }
        if let [only] = &fields[..]
            && !columns_named(&[only], &PATH_COLUMNS).is_empty()
        {
            let form = Self::Fields { separator: Separator::Tab, path: 0, label: Label::Folder, num_fields: Some(1) };
            return Ok(Some((form, true)));
        }
        if is_header(&fields) {
            return by_names(&fields, separator).map(|form| Some((form, true)));
        }
        if separator == Separator::Blanks && !line.text.contains('"') {
            return Ok(by_blanks(line)?.map(|form| (form, false)));
        }
        Ok(by_content(&fields, separator)?.map(|form| (form, false)))
    }

    /// Returns an image's path and its label.
    ///
    /// # Errors
    /// Says what was expected and found.
    pub fn read<'a>(&self, line: Line<'a>) -> std::result::Result<(Cow<'a, str>, Cow<'a, str>), String> {
        let (path, label) = match self {
            Self::Blanks { label_first } => {
                let (path, label) = split_blanks(line.text, *label_first)
                    .ok_or_else(|| format!("expected an image's path and its label, found {}", line.quoted()))?;
                (Cow::Borrowed(path), Cow::Borrowed(label))
            }
            Self::Fields { separator, path, label, num_fields } => {
                let mut fields = line.fields(*separator)?;
                // Spreadsheets add to the end of a row.
                let num = num_fields.unwrap_or(fields.len().max(path + 1));
                while fields.len() > num && fields.last().is_some_and(|field| field.is_empty()) {
                    fields.pop();
                }
                if fields.len() != num {
                    let hint =
                        if fields.len() > num { " (quotes go around a field that has commas in it)" } else { "" };
                    return Err(format!("expected {num} fields, found {}: {}{hint}", fields.len(), line.quoted()));
                }
                let label = match label {
                    Label::Field(at) => {
                        let found = fields.get_mut(*at).map(std::mem::take);
                        found.ok_or_else(|| format!("expected a label, found {}", line.quoted()))?
                    }
                    Label::Folder => {
                        let folder = fields[*path].rsplit(['/', '\\']).nth(1).unwrap_or_default().to_owned();
                        Cow::Owned(folder)
                    }
                };
                (std::mem::take(&mut fields[*path]), label)
            }
        };
        check_image(&path)?;
        match (label.is_empty(), whole(&label)) {
            (true, _) => Err(format!("expected a label of {}, found none", quoted(&path))),
            // Lists write -1 for no label.
            (false, Some(number)) if number < 0 => {
                Err(format!("expected a name or a number from 0 as the label of {}, found {label}", quoted(&path)))
            }
            _ => Ok((path, label)),
        }
    }
}

fn check_image(path: &str) -> std::result::Result<(), String> {
    if is_image(Path::new(path).file_name().unwrap_or_default()) {
        return Ok(());
    }
    let kinds = "images are read from jpg, png, bmp, webp, pgm and ppm";
    Err(format!("expected the path of an image, found {}: {kinds}", quoted(path)))
}

/// Whether these are names of columns: no number, no image, and one that is known.
fn is_header(fields: &[Cow<str>]) -> bool {
    let is_number = |field: &str| field.parse::<f64>().is_ok();
    let has = |names: &[&str]| !columns_named(fields, names).is_empty();
    fields.len() > 1
        && !fields.iter().any(|field| is_number(field) || names_image(field) || field.contains(['/', '\\']))
        && (has(&PATH_COLUMNS) || has(&LABEL_COLUMNS))
}

fn by_names(fields: &[Cow<str>], separator: Separator) -> std::result::Result<Form, String> {
    let paths = columns_named(fields, &PATH_COLUMNS);
    let labels = LABEL_COLUMNS.iter().map(|name| columns_named(fields, &[name])).find(|found| !found.is_empty());
    let labels = labels.unwrap_or_default();
    let found = || quoted(&fields.join(", "));
    match (&paths[..], &labels[..]) {
        (&[path], &[label]) => {
            // A path between blanks could have blanks itself: then its end and the label's place decide.
            let form = match separator {
                Separator::Blanks if fields.len() == 2 => Form::Blanks { label_first: label < path },
                _ => Form::Fields { separator, path, label: Label::Field(label), num_fields: Some(fields.len()) },
            };
            Ok(form)
        }
        ([], _) => Err(format!("expected a column of image files, such as path, found {}", found())),
        (_, []) => Err(format!("expected a column of labels, such as label, found {}", found())),
        ([_, _, ..], _) => Err(format!("expected one column of image files, found {}: {PAIRS}", found())),
        (_, [_, _, ..]) => Err(format!("expected one column of labels, found {}", found())),
    }
}

/// The form of a line without column names, by what its fields are.
fn by_content(fields: &[Cow<str>], separator: Separator) -> std::result::Result<Option<Form>, String> {
    let images: Vec<usize> = (0..fields.len()).filter(|&i| names_image(&fields[i])).collect();
    let is_whole = |i: usize| fields.get(i).is_some_and(|field| whole(field).is_some());
    let fields_at = |path, label, num_fields| Ok(Some(Form::Fields { separator, path, label, num_fields }));
    let at = |path, label, num| fields_at(path, label, Some(num));
    match (fields.len(), &images[..]) {
        (_, []) => Ok(None),
        (_, [_, _, ..]) => Err(format!("expected the path of one image, found two: {PAIRS}")),
        (1, _) => at(0, Label::Folder, 1),
        (2, &[path]) => at(path, Label::Field(1 - path), 2),
        // MXNet's im2rec: key, labels of which the first counts, path.
        (num, &[path]) if path + 1 == num && (0..path).all(|i| fields[i].parse::<f64>().is_ok()) => {
            at(path, Label::Field(1), num)
        }
        // insightface: whether the face is aligned, path, label, perhaps a box and landmarks; or a row number first.
        (_, [1]) if is_whole(0) && is_whole(2) => fields_at(1, Label::Field(2), None),
        _ => {
            let found = quoted(&fields.join(", "));
            Err(format!("expected a first line that names the columns, such as path,label, found {found}"))
        }
    }
}

fn by_blanks(line: Line) -> std::result::Result<Option<Form>, String> {
    let tokens: Vec<&str> = line.text.split_whitespace().collect();
    let num = tokens.iter().filter(|token| names_image(token)).count();
    let (first, last) = (tokens[0], tokens[tokens.len() - 1]);
    match (num, tokens.len()) {
        (0, _) => Ok(None),
        (1, 1) => {
            let separator = Separator::Tab;
            Ok(Some(Form::Fields { separator, path: 0, label: Label::Folder, num_fields: Some(1) }))
        }
        // MXNet's or insightface's list with blanks instead of tabs.
        (1, 3..) if [first, tokens[1], tokens[2]].iter().filter(|token| whole(token).is_some()).count() == 2 => {
            let fields: Vec<Cow<str>> = tokens.iter().map(|token| Cow::Borrowed(*token)).collect();
            by_content(&fields, Separator::Blanks)
        }
        (2.., _) => Err(format!("expected the path of one image, found two: {PAIRS}")),
        _ => Ok(Some(Form::Blanks { label_first: names_image(last) })),
    }
}

/// Splits a line of a path with blanks and a label.
fn split_blanks(text: &str, label_first: bool) -> Option<(&str, &str)> {
    let text = text.trim();
    if label_first {
        let (label, path) = text.split_once(char::is_whitespace)?;
        return Some((path.trim_start(), label));
    }
    let mut end = None;
    for token in text.split_whitespace() {
        // The token's place in the text: both are one string.
        let start = token.as_ptr() as usize - text.as_ptr() as usize;
        if names_image(token) {
            end = Some(start + token.len());
        }
    }
    let (path, label) = text.split_at(end?);
    Some((path, label.trim()))
}
