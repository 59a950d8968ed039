//! Landmarks of images in a CSV.

use std::collections::HashMap;
use std::path::Path;

use super::Landmarks;
use crate::error::{Error, Result};

/// Names of the ten columns, as detectors' outputs are often kept: left and right are the image's.
const COLUMNS: [&str; 10] = ["lex", "ley", "rex", "rey", "nx", "ny", "lmx", "lmy", "rmx", "rmy"];

/// Reads a CSV whose first row names a column `file` and ten of coordinates, in pixels of the image: `lex, ley` (the eye on the
/// image's left), `rex, rey`, `nx, ny` (nose), `lmx, lmy, rmx, rmy` (mouth corners). Files are `PERSON/IMAGE`;
/// rows without coordinates are left out.
///
/// # Errors
/// When the list cannot be read, a column is missing, a coordinate is no number, or a file comes twice.
pub fn read_landmarks(path: &Path) -> Result<HashMap<String, Landmarks>> {
    let mut table = Table::open(path)?;
    let file = table.column("file")?;
    let columns = COLUMNS.map(|name| table.column(name)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut landmarks = HashMap::new();
    while let Some(row) = table.next()? {
        // A detector found no face.
        if columns.iter().all(|&column| row[column].is_empty()) {
            continue;
        }
        let mut values = [0f32; 10];
        for (value, &column) in values.iter_mut().zip(&columns) {
            let parsed = row[column].parse().ok().filter(|v: &f32| v.is_finite());
            *value = parsed.ok_or_else(|| table.error(format!("expected a number, found {:?}", &row[column])))?;
        }
        let points = std::array::from_fn(|i| [values[2 * i], values[2 * i + 1]]);
        if landmarks.insert(row[file].to_owned(), points).is_some() {
            return Err(table.error(format!("expected each file once, found {} again", &row[file])));
        }
    }
    Ok(landmarks)
}

/// Reads a column of a CSV by the file it belongs to.
///
/// # Errors
/// When the list cannot be read, or it or the column `file` is missing.
pub fn read_conditions(path: &Path, column: &str) -> Result<HashMap<String, String>> {
    let mut table = Table::open(path)?;
    let (file, condition) = (table.column("file")?, table.column(column)?);
    let mut conditions = HashMap::new();
    while let Some(row) = table.next()? {
        conditions.insert(row[file].to_owned(), row[condition].to_owned());
    }
    Ok(conditions)
}

/// A CSV with named columns.
struct Table<'a> {
    path: &'a Path,
    reader: csv::Reader<std::fs::File>,
    header: csv::StringRecord,
    line: u64,
}

impl<'a> Table<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
        let header = reader.headers().map_err(|e| Error::Line { path: path.to_owned(), line: 1, what: e.to_string() });
        Ok(Self { path, header: header?.clone(), reader, line: 1 })
    }

    fn column(&self, name: &str) -> Result<usize> {
        let found = self.header.iter().position(|column| column == name);
        found.ok_or_else(|| {
            let all: Vec<&str> = self.header.iter().collect();
            self.error(format!("expected a column {name}, found {all:?}"))
        })
    }

    fn next(&mut self) -> Result<Option<csv::StringRecord>> {
        let mut record = csv::StringRecord::new();
        let read = self.reader.read_record(&mut record);
        self.line = self.reader.position().line();
        match read {
            Ok(true) => Ok(Some(record)),
            Ok(false) => Ok(None),
            Err(e) => Err(self.error(e.to_string())),
        }
    }

    fn error(&self, what: String) -> Error {
        Error::Line { path: self.path.to_owned(), line: self.line as usize, what }
    }
}
