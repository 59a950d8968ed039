//! Tables: lists whose first line names the columns.

use std::path::Path;

use super::{Line, Separator, Text, columns_named, quoted};
use crate::error::{Error, Result};

/// Reader of a table with named columns, separated by tabs, commas or semicolons. Columns come in any order and may be
/// more than are asked for.
pub(crate) struct Table {
    text: Text,
    separator: Separator,
    header: Vec<String>,
    header_line: usize,
}

/// A row of a table.
#[derive(Debug)]
pub(crate) struct Row {
    /// The line of the row, from 1.
    pub line: usize,
    /// Its fields, as many as columns.
    pub fields: Vec<String>,
}

impl Table {
    /// Opens a table.
    ///
    /// # Errors
    /// When it cannot be read, or is empty.
    pub fn open(path: &Path) -> Result<Self> {
        let text = Text::read(path)?;
        let Some(first) = text.lines().next() else {
            return Err(text.error(1, "expected a line that names the columns, found an empty file".to_owned()));
        };
        // A single column: what rows have more would be separated by commas.
        let separator = match Separator::of(first)[0] {
            Separator::Blanks if !first.text.trim().contains(char::is_whitespace) => Separator::Comma,
            found => found,
        };
        let header = fields(first, separator).map_err(|what| text.error(first.number, what))?;
        let header_line = first.number;
        Ok(Self { text, separator, header, header_line })
    }

    /// Returns the index of the column that has one of these names, in any case and with or without underscores, if
    /// there is one.
    ///
    /// # Errors
    /// When two columns have such a name.
    pub fn find(&self, names: &[&str]) -> Result<Option<usize>> {
        match columns_named(&self.header, names)[..] {
            [] => Ok(None),
            [column] => Ok(Some(column)),
            [first, second, ..] => {
                let [first, second] = [first, second].map(|column| &self.header[column]);
                let what = format!("expected one column {}, found {first} and {second}", names[0]);
                Err(self.text.error(self.header_line, what))
            }
        }
    }

    /// Returns the index of the column that has one of these names.
    ///
    /// # Errors
    /// When there is none, or two.
    pub fn column(&self, names: &[&str]) -> Result<usize> {
        self.find(names)?.ok_or_else(|| {
            let found = quoted(&self.header.join(", "));
            self.text.error(self.header_line, format!("expected a column {}, found {found}", names[0]))
        })
    }

    /// Returns the rows in order.
    ///
    /// # Errors
    /// When a row has a quote that is not closed, or another number of fields than there are columns.
    pub fn rows(&self) -> impl Iterator<Item = Result<Row>> {
        self.text.lines().skip(1).map(|line| {
            let mut fields = fields(line, self.separator).map_err(|what| self.text.error(line.number, what))?;
            // Spreadsheets leave out what is empty at the end of a row, or add to it.
            while fields.len() > self.header.len() && fields.last().is_some_and(String::is_empty) {
                fields.pop();
            }
            if fields.len() != self.header.len() {
                let what = format!("expected {} fields, found {}", self.header.len(), fields.len());
                return Err(self.text.error(line.number, what));
            }
            Ok(Row { line: line.number, fields })
        })
    }

    /// Returns an error about a line.
    pub fn error(&self, line: usize, what: String) -> Error {
        self.text.error(line, what)
    }
}

fn fields(line: Line, separator: Separator) -> std::result::Result<Vec<String>, String> {
    Ok(line.fields(separator)?.into_iter().map(|field| field.into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_found_by_any_of_their_names() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("t.csv");
        let open = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Table::open(&path)
        };
        for text in ["n,Is Same,score\n1,yes,\"0,5\"\n", "\u{feff}n\tis_same\tscore\r\n1\tyes\t0,5\t\r\n"] {
            let table = open(text)?;
            assert_eq!(table.column(&["is_same", "label"])?, 1);
            let rows = table.rows().collect::<Result<Vec<_>>>()?;
            assert_eq!((rows[0].line, &rows[0].fields[..]), (2, &["1", "yes", "0,5"].map(str::to_owned)[..]));
        }
        let error = |text: &str| match open(text)
            .and_then(|t| t.column(&["score"]).and(t.rows().collect::<Result<Vec<_>>>()))
        {
            Ok(_) => panic!("{text:?} was taken"),
            Err(error) => error.to_string(),
        };
        assert!(error("").contains(":1: expected a line that names the columns"));
        assert!(error("a,b\n").contains("expected a column score, found \"a, b\""));
        assert!(error("score,Score\n1,2\n").contains("found score and Score"));
        assert!(error("score\n1\n2,3\n").contains(":3: expected 1 fields, found 2"));
        assert!(error("score,x\n1,\"a\n2,b\"\n").contains(":2: expected every quote to be closed"));
        Ok(())
    }
}
