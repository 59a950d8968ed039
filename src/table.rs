//! A CSV whose first row names its columns.

use std::path::Path;

use crate::error::{Error, Result};

/// A CSV with named columns.
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

    /// The number of the column of this name, if there is one.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|column| column == name)
    }

    /// The number of the column of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn column(&self, name: &str) -> Result<usize> {
        self.find(name).ok_or_else(|| {
            let all: Vec<&str> = self.header.iter().collect();
            self.error(format!("expected a column {name}, found {all:?}"))
        })
    }

    /// The next row, as many fields as columns.
    ///
    /// # Errors
    /// When it is no CSV or has another number of fields.
    pub fn next(&mut self) -> Result<Option<csv::StringRecord>> {
        let mut record = csv::StringRecord::new();
        let read = self.reader.read_record(&mut record);
        let position = match &read {
            Ok(_) => record.position(),
            Err(e) => e.position(),
        };
        // The row's own line: the reader is at the next one already.
        self.line = position.map_or(self.line, csv::Position::line);
        match read {
            Ok(true) => Ok(Some(record)),
            Ok(false) => Ok(None),
            Err(e) => Err(self.error(e.to_string())),
        }
    }

    /// The line of the row read last, from 1.
    pub fn line(&self) -> usize {
        self.line as usize
    }

    /// An error on the row read last.
    pub fn error(&self, what: String) -> Error {
        Error::Line { path: self.path.to_owned(), line: self.line(), what }
    }
}
