//! Landmarks and conditions of images, read from tables.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Dataset, Landmarks};
use crate::error::Result;
use crate::lists::{PATH_COLUMNS, Table, person_and_file, quoted, truth};

/// Names of the ten coordinate columns, as detectors often write them; left and right are as seen in the image.
const COLUMNS: [[&str; 3]; 10] = [
    ["lex", "lefteye_x", "x1"],
    ["ley", "lefteye_y", "y1"],
    ["rex", "righteye_x", "x2"],
    ["rey", "righteye_y", "y2"],
    ["nx", "nose_x", "x3"],
    ["ny", "nose_y", "y3"],
    ["lmx", "leftmouth_x", "x4"],
    ["lmy", "leftmouth_y", "y4"],
    ["rmx", "rightmouth_x", "x5"],
    ["rmy", "rightmouth_y", "y5"],
];

/// Reads landmarks from a table with a column `file` and ten columns of coordinates, in pixels of the image: `lex, ley`
/// (the eye on the image's left), `rex, rey`, `nx, ny` (nose), `lmx, lmy, rmx, rmy` (mouth corners); or `lefteye_x` and
/// so on, or `x1, y1` to `x5, y5`. Files are known by the last two parts of their paths, `PERSON/IMAGE`; rows without
/// coordinates are skipped.
///
/// # Errors
/// When the list cannot be read, a column is missing, a coordinate is not a finite number, or a file is listed twice
/// with different landmarks.
pub fn read_landmarks(path: &Path) -> Result<BTreeMap<String, Landmarks>> {
    let table = Table::open(path)?;
    let file = file_column(&table, None)?;
    // A box may have columns x1, y1 beside the landmarks: all ten columns are of one kind.
    let kinds = [0, 1, 2].map(|kind| COLUMNS.map(|names| names[kind]));
    let has_all = |kind: &&[&str; 10]| kind.iter().all(|name| matches!(table.find(&[name]), Ok(Some(_))));
    let kind = kinds.iter().find(has_all).unwrap_or(&kinds[0]);
    let columns = kind.iter().map(|name| table.column(&[name])).collect::<Result<Vec<_>>>()?;
    let mut landmarks: BTreeMap<String, (Landmarks, usize)> = BTreeMap::new();
    for row in table.rows() {
        let row = row?;
        // The detector found no face.
        if columns.iter().all(|&column| row.fields[column].is_empty()) {
            continue;
        }
        let mut values = [0f32; 10];
        for (value, &column) in values.iter_mut().zip(&columns) {
            let field = &row.fields[column];
            let parsed = field.parse().ok().filter(|v: &f32| v.is_finite());
            *value =
                parsed.ok_or_else(|| table.error(row.line, format!("expected a number, found {}", quoted(field))))?;
        }
        let points = std::array::from_fn(|i| [values[2 * i], values[2 * i + 1]]);
        let name = image_name(&row.fields[file]);
        match landmarks.entry(name.clone()) {
            Entry::Occupied(before) if before.get().0 != points => {
                let line = before.get().1;
                let what = format!("expected one set of landmarks for {name}, found another than in line {line}");
                return Err(table.error(row.line, what));
            }
            Entry::Occupied(_) => {}
            Entry::Vacant(free) => drop(free.insert((points, row.line))),
        }
    }
    Ok(landmarks.into_iter().map(|(name, (points, _))| (name, points)).collect())
}

/// Says which rows are of no image of a data set; none if all are.
pub fn rows_without_images<T>(rows: &BTreeMap<String, T>, images: &dyn Dataset) -> Option<String> {
    let known: BTreeSet<String> = (0..images.len()).filter_map(|index| images.person_and_file(index)).collect();
    let mut unknown = rows.keys().filter(|name| !known.contains(*name));
    let first = unknown.next()?;
    let num = 1 + unknown.count();
    Some(format!("{num} rows, such as that of {first}, are of no image of the data set and are left out"))
}

fn image_name(path: &str) -> String {
    person_and_file(path).unwrap_or_else(|| path.to_owned())
}

/// Returns the column of image files, which is not `other`; without another, `name` is one.
fn file_column(table: &Table, other: Option<&str>) -> Result<usize> {
    let names: Vec<&str> = PATH_COLUMNS.into_iter().filter(|name| Some(*name) != other).collect();
    match table.find(&names)? {
        Some(column) => Ok(column),
        None => table.find(&["name"])?.map_or_else(|| table.column(&names), Ok),
    }
}

/// Reads a column of yes and no (`1` or `0`, `true` or `false` and the like) from a table, by its column `file`.
///
/// # Errors
/// When the list cannot be read, `file` or the column is missing, a field says neither, or two rows contradict each
/// other.
pub fn read_conditions(path: &Path, column: &str) -> Result<BTreeMap<String, bool>> {
    let table = Table::open(path)?;
    // The condition first: its column may be called as a file's column is.
    let condition = table.column(&[column])?;
    let file = file_column(&table, Some(column))?;
    let mut conditions: BTreeMap<String, (bool, usize)> = BTreeMap::new();
    for row in table.rows() {
        let row = row?;
        let (name, field) = (image_name(&row.fields[file]), &row.fields[condition]);
        let wears = |word: &str| match word.to_lowercase().as_str() {
            "mask" | "masked" | "with_mask" => Some(true),
            "clean" | "unmasked" | "no_mask" | "without_mask" => Some(false),
            other => truth(other),
        };
        let is_so = wears(field).ok_or_else(|| {
            table.error(row.line, format!("expected {column} of {name} to be 1 or 0, found {}", quoted(field)))
        })?;
        let (before, line) = *conditions.entry(name.clone()).or_insert((is_so, row.line));
        if before != is_so {
            let what =
                format!("expected {column} of {name} to be {} as in line {line}, found {field}", u8::from(before));
            return Err(table.error(row.line, what));
        }
    }
    Ok(conditions.into_iter().map(|(name, (is_so, _))| (name, is_so)).collect())
}
