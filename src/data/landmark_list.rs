//! Landmarks of images in a CSV.

use std::collections::HashMap;
use std::path::Path;

use super::Landmarks;
use crate::error::Result;
use crate::table::Table;

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
