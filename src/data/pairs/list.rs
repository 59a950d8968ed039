//! Lists of pairs: of numbered images of people, as LFW, MFR2 and Kaggle's copies of LFW have them, or of image files.
//!
//! Counts in a list are checked against its lines; they never determine an allocation.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::entry::PairEntry;
use super::form::Form;
use crate::data::decode::names_image;
use crate::error::{Error, Result};
use crate::lists::{Line as TextLine, Separator, Text};

/// The pairs of a list, fold by fold, in its order.
#[derive(Clone, Debug, PartialEq)]
pub struct PairList {
    pub(super) path: PathBuf,
    pub(super) entries: Vec<PairEntry>,
    num_folds: usize,
}

impl PairList {
    /// Reads a list of pairs, in LFW's format if its first line is of one or two numbers, otherwise a pair a line:
    /// - `name i j` (the same person) and `name1 i name2 j` (different people), as MFR2 has them, between tabs, commas
    ///   or blanks; with Kaggle's first line `name,imagenum1,imagenum2` or `name,imagenum1,name,imagenum2`;
    /// - two image files and whether they show one person (`1` or `0`, `true`, `same` and the like), which comes first
    ///   or last; with a first line of column names in any order, of which one is `same`, `label`, `match` or the like
    ///   and one may be `fold`.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is not text, [`Error::Line`] for a line of
    /// another form, a number that is not whole, folds that are not of equal size, an early end of the file, or text
    /// after the last fold.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let text = Text::read(path.as_ref())?;
        let lines = Lines::new(&text);
        let is_digits = |field: &str| field.bytes().all(|b| b.is_ascii_digit());
        let is_lfw = match &lines.first()[..] {
            [] => true,
            [count] => is_digits(count),
            [folds, pairs] => is_digits(folds) && !names_image(pairs),
            _ => false,
        };
        if is_lfw { Self::parse_lfw(lines) } else { Self::parse(&text) }
    }

    /// Reads LFW's `pairs.txt`: a line `folds n`, then per fold `n` lines `name i j` (the same person) and `n` lines
    /// `name1 i name2 j` (different people). If the first line is just `n` (`pairsDevTest.txt`), the list has one fold.
    ///
    /// # Errors
    /// Same as [`PairList::read`].
    pub fn read_lfw(path: impl AsRef<Path>) -> Result<Self> {
        Self::parse_lfw(Lines::new(&Text::read(path.as_ref())?))
    }

    fn parse_lfw(mut lines: Lines) -> Result<Self> {
        let header = lines.next("\"folds pairs\"")?;
        let (num_folds, num_pairs): (usize, usize) = match &header.fields[..] {
            [pairs] => (1, lines.number(&header, pairs)?),
            [folds, pairs] => (lines.number(&header, folds)?, lines.number(&header, pairs)?),
            _ => return Err(lines.error(&header, "expected the numbers of folds and of pairs")),
        };
        let mut entries = Vec::new();
        for fold in 0..num_folds {
            for is_same in [true, false] {
                for i in 1..=num_pairs {
                    let kind = if is_same { "same \"name i j\"" } else { "different \"name1 i name2 j\"" };
                    let expected = format!("pair {i} of {num_pairs} of fold {fold}, {kind}");
                    let line = lines.next(&expected)?;
                    let fields: Vec<&str> = line.fields.iter().map(|field| &**field).collect();
                    let entry = Form::Names { same: None }.entry(&fields, line.number);
                    let entry = entry.map_err(|_| lines.error(&line, &format!("expected {expected}")))?;
                    if entry.is_same != is_same {
                        return Err(lines.error(&line, &format!("expected {expected}")));
                    }
                    entries.push(PairEntry { fold, ..entry });
                }
            }
        }
        lines.end("the last fold")?;
        Ok(Self { path: lines.path().to_owned(), entries, num_folds })
    }

    fn parse(text: &Text) -> Result<Self> {
        let (form, separator, num_skipped) = Form::of(text)?;
        let mut entries = Vec::new();
        for line in text.lines().skip(num_skipped) {
            let entry = form.read(line, separator).map_err(|what| text.error(line.number, what))?;
            entries.push(entry);
        }
        // Folds are numbered from any number. The protocol cuts the list into parts of equal size, so folds must be
        // such parts.
        let numbers: BTreeSet<usize> = entries.iter().map(|entry| entry.fold).collect();
        let places: BTreeMap<usize, usize> = numbers.into_iter().zip(0..).collect();
        let (mut sizes, num) = (vec![0; places.len()], entries.len());
        for entry in &mut entries {
            entry.fold = places[&entry.fold];
            sizes[entry.fold] += 1;
        }
        let num_folds = places.len().max(1);
        // As scikit-learn's KFold has them: the first ones are larger by one if the number is not divisible.
        let expected = |fold: usize| num / num_folds + usize::from(fold < num % num_folds);
        if let Some(fold) = (0..sizes.len()).find(|&fold| sizes[fold] != expected(fold)) {
            let what =
                format!("expected {} pairs in fold {} of {num_folds}, found {}", expected(fold), fold + 1, sizes[fold]);
            return Err(text.error(1, what));
        }
        entries.sort_by_key(|entry| entry.fold);
        Ok(Self { path: text.path().to_owned(), entries, num_folds })
    }

    /// The pairs, fold by fold, in the list's order.
    pub fn entries(&self) -> &[PairEntry] {
        &self.entries
    }

    /// Number of folds; every entry's `fold` is below it.
    pub fn num_folds(&self) -> usize {
        self.num_folds
    }

    /// Returns an error about a pair's line.
    pub(in crate::data) fn error(&self, entry: &PairEntry, what: String) -> Error {
        Error::Line { path: self.path.clone(), line: entry.line, what }
    }
}

/// The lines of a list of records between tabs or blanks, read one after the other.
pub(super) struct Lines<'a> {
    text: &'a Text,
    /// In reverse order, so that `pop` returns the next line.
    rest: Vec<TextLine<'a>>,
    /// Number of the line after the last one, where an early end is reported.
    end: usize,
}

/// A line and its fields.
pub(super) struct Line<'a> {
    pub number: usize,
    /// Those between tabs, commas or semicolons, which leave blanks to names, or else between blanks.
    pub fields: Vec<Cow<'a, str>>,
}

fn fields(line: TextLine<'_>) -> std::result::Result<Vec<Cow<'_, str>>, String> {
    line.fields(Separator::of(line)[0])
}

impl<'a> Lines<'a> {
    pub fn new(text: &'a Text) -> Self {
        let trimmed = |line: TextLine<'a>| TextLine { text: line.text.trim(), ..line };
        let mut rest: Vec<TextLine> = text.lines().map(trimmed).collect();
        let end = text.num_lines() + 1;
        rest.reverse();
        Self { text, rest, end }
    }

    fn path(&self) -> &Path {
        self.text.path()
    }

    /// Returns the fields of the next line without consuming it; none at the end, or if they are wrong.
    pub fn first(&self) -> Vec<Cow<'a, str>> {
        self.rest.last().and_then(|&line| fields(line).ok()).unwrap_or_default()
    }

    pub fn next(&mut self, expected: &str) -> Result<Line<'a>> {
        let what = || format!("expected {expected}, found the end of the file");
        let line = self.rest.pop().ok_or_else(|| self.text.error(self.end, what()))?;
        let fields = fields(line).map_err(|what| self.text.error(line.number, what))?;
        Ok(Line { number: line.number, fields })
    }

    pub fn end(&mut self, last: &str) -> Result<()> {
        match self.rest.pop() {
            Some(line) => {
                let what = format!("expected the end of the file after {last}, found {}", line.quoted());
                Err(self.text.error(line.number, what))
            }
            None => Ok(()),
        }
    }

    pub fn error(&self, line: &Line, expected: &str) -> Error {
        let found = crate::lists::quoted(&line.fields.join(" "));
        self.text.error(line.number, format!("{expected}, found {found}"))
    }

    /// Parses a whole number from 1.
    pub fn number<T: FromStr + PartialOrd + From<u8>>(&self, line: &Line, field: &str) -> Result<T> {
        let number = field.parse().ok().filter(|n| *n >= T::from(1));
        number.ok_or_else(|| self.error(line, &format!("expected a whole number from 1 for \"{field}\"")))
    }
}
