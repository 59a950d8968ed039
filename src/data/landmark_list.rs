//! Landmarks and conditions of images, read from CSV files.

use std::collections::HashMap;
use std::path::Path;

use super::Landmarks;
use crate::error::Result;
use crate::table::Table;

/// Names of the ten coordinate columns, as detectors often write them; left and right are as seen in the image.
const COLUMNS: [&str; 10] = ["lex", "ley", "rex", "rey", "nx", "ny", "lmx", "lmy", "rmx", "rmy"];

/// Reads landmarks from a CSV with a column `file` and ten columns of coordinates, in pixels of the image: `lex, ley`
/// (the eye on the image's left), `rex, rey`, `nx, ny` (nose), `lmx, lmy, rmx, rmy` (mouth corners). Files are named
/// `PERSON/IMAGE`; rows without coordinates are skipped.
///
/// # Errors
/// When the list cannot be read, a column is missing, a coordinate is not a finite number, or a file is listed twice.
pub fn read_landmarks(path: &Path) -> Result<HashMap<String, Landmarks>> {
    let mut table = Table::open(path)?;
    let file = table.column("file")?;
    let columns = COLUMNS.map(|name| table.column(name)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut landmarks = HashMap::new();
    while let Some(row) = table.next()? {
        // The detector found no face.
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

/// Reads one column of a CSV, keyed by its column `file`.
///
/// # Errors
/// When the list cannot be read, or `file` or the column is missing.
pub fn read_conditions(path: &Path, column: &str) -> Result<HashMap<String, String>> {
    let mut table = Table::open(path)?;
    let (file, condition) = (table.column("file")?, table.column(column)?);
    let mut conditions = HashMap::new();
    while let Some(row) = table.next()? {
        conditions.insert(row[file].to_owned(), row[condition].to_owned());
    }
    Ok(conditions)
}
