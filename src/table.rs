//! CSV files with a header row.

use std::path::Path;

use crate::error::{Error, Result};

/// Reader of a CSV with named columns.
pub(crate) struct Table<'a> {
    path: &'a Path,
    reader: csv::Reader<std::fs::File>,
    header: csv::StringRecord,
    line: u64,
}

impl<'a> Table<'a> {
    /// Opens a CSV whose first row names its columns.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(path: &'a Path) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
        let header = reader.headers().map_err(|e| Error::Line { path: path.to_owned(), line: 1, what: e.to_string() });
        Ok(Self { path, header: header?.clone(), reader, line: 1 })
    }

    /// Returns the index of the column `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|column| column == name)
    }

    /// Returns the index of the column `name`.
    ///
    /// # Errors
    /// When the column is missing.
    pub fn column(&self, name: &str) -> Result<usize> {
        self.find(name).ok_or_else(|| {
            let all: Vec<&str> = self.header.iter().collect();
            self.error(format!("expected a column {name}, found {all:?}"))
        })
    }

    /// Returns the next row, with as many fields as columns; `None` at the end of the file.
    ///
    /// # Errors
    /// When the row is not valid CSV or has a different number of fields.
    pub fn next(&mut self) -> Result<Option<csv::StringRecord>> {
        let mut record = csv::StringRecord::new();
        let read = self.reader.read_record(&mut record);
        let position = match &read {
            Ok(_) => record.position(),
            Err(e) => e.position(),
        };
        // The line of the row itself: the reader is already past it.
        self.line = position.map_or(self.line, csv::Position::line);
        match read {
            Ok(true) => Ok(Some(record)),
            Ok(false) => Ok(None),
            Err(e) => Err(self.error(e.to_string())),
        }
    }

    /// Line number of the row read last, from 1.
    pub fn line(&self) -> usize {
        self.line as usize
    }

    /// Returns an error with the line number of the row read last.
    pub fn error(&self, what: String) -> Error {
        Error::Line { path: self.path.to_owned(), line: self.line(), what }
    }
}
