//! The people and faces of a gallery.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::{OptionalExtension, Row, ToSql, Transaction, params};
use serde::Serialize;

use super::CHECKSUM;
use super::store::{Gallery, failure, gallery_error, remove_columns};
use crate::error::{Error, Result};

/// Longest name of a person, in bytes.
const LONGEST_NAME: usize = 1000;

/// A face to enrol.
#[derive(Clone, Debug, PartialEq)]
pub struct NewFace {
    /// Name of the person, without line breaks and tabs.
    pub person: String,
    /// Embedding of length 1.
    pub embedding: Vec<f32>,
    /// SHA-256 of the image's file: a person's photo is enrolled once.
    pub image: [u8; 32],
    /// Where the image came from, for people.
    pub source: String,
    /// Seconds since 1970.
    pub enrolled: i64,
    /// The detector's score; none of an aligned crop.
    pub score: Option<f32>,
    /// The face's side in pixels of the photo; none of an aligned crop.
    pub side: Option<f32>,
    /// Sharpness of the crop: variance of its Laplacian.
    pub sharpness: f32,
    /// Probability that the face wears a mask; none if the network cannot tell.
    pub mask: Option<f32>,
}

/// A face in a gallery, without its embedding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StoredFace {
    /// Number of the face, never used again.
    pub id: i64,
    /// Name of the person.
    pub person: String,
    /// Where the image came from.
    pub source: String,
    /// Seconds since 1970.
    pub enrolled: i64,
    /// The detector's score; none of an aligned crop.
    pub score: Option<f32>,
    /// The face's side in pixels of the photo; none of an aligned crop.
    pub side: Option<f32>,
    /// Sharpness of the crop: variance of its Laplacian.
    pub sharpness: f32,
    /// Probability that the face wears a mask; none if the network could not tell.
    pub mask: Option<f32>,
}

/// A person in a gallery.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Person {
    /// Name.
    pub name: String,
    /// Number of faces.
    pub num_faces: usize,
    /// When the first of them was enrolled, in seconds since 1970.
    pub first_enrolled: i64,
    /// When the last of them was enrolled.
    pub last_enrolled: i64,
}

/// What became of a face.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is in the gallery now, with this number.
    New(i64),
    /// The person's photo was there before.
    Known(i64),
}

/// What a removal did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Number of faces.
    pub num_faces: usize,
    /// Whether the log of changes is empty. If another process was reading, the log keeps what was removed until
    /// [`Gallery::compact`] runs alone, or the last process that has the gallery open ends.
    pub is_log_empty: bool,
}

/// What the checksum of a face is of.
struct Checked<'a> {
    person: i64,
    embedding: &'a [u8],
    image: &'a [u8],
    source: &'a str,
    enrolled: i64,
    /// Score, side, sharpness, mask.
    numbers: [Option<f64>; 4],
}

impl Checked<'_> {
    fn checksum(&self) -> u32 {
        let mut digest = CHECKSUM.digest();
        digest.update(&self.person.to_le_bytes());
        digest.update(&self.enrolled.to_le_bytes());
        for number in self.numbers {
            digest.update(&[u8::from(number.is_some())]);
            digest.update(&number.unwrap_or_default().to_le_bytes());
        }
        digest.update(self.embedding);
        digest.update(self.image);
        digest.update(self.source.as_bytes());
        digest.finalize()
    }
}

/// A face with its embedding, as it is in the file.
pub(super) struct Record {
    pub id: i64,
    pub person: i64,
    pub embedding: Vec<f32>,
    pub mask: Option<f32>,
}

impl Record {
    /// Columns that [`Self::read`] reads.
    pub const COLUMNS: &str = "id, person, embedding, image, source, checksum, enrolled, score, side, sharpness, mask";

    /// Reads a row, and checks it.
    ///
    /// # Errors
    /// When it is not as it was written: says so, with the face's number and source.
    pub fn read(row: &Row, dim: usize) -> rusqlite::Result<Result<Self, String>> {
        let (id, person): (i64, i64) = (row.get(0)?, row.get(1)?);
        let damaged = |what: &str| Ok(Err(format!("face {id}: {what}")));
        let (Ok(embedding), Ok(image)) = (row.get_ref(2)?.as_blob(), row.get_ref(3)?.as_blob()) else {
            return damaged("its values are of other types");
        };
        let Ok(source) = row.get_ref(4)?.as_str() else { return damaged("its source is no text") };
        let numbers = [row.get(7)?, row.get(8)?, row.get(9)?, row.get(10)?];
        let checked = Checked { person, embedding, image, source, enrolled: row.get(6)?, numbers };
        if i64::from(checked.checksum()) != row.get::<_, i64>(5)? {
            return damaged(&format!(
                "it is not as it was enrolled from {source}: remove it and enrol the photo again"
            ));
        }
        let embedding: Vec<f32> = embedding.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if embedding.len() != dim {
            return damaged(&format!("expected an embedding of {dim} elements, found {}", embedding.len()));
        }
        Ok(Ok(Self { id, person, embedding, mask: numbers[3].map(|mask| mask as f32) }))
    }
}

impl Gallery {
    /// Enrols faces, all or none of them. A photo that the person has is passed over.
    ///
    /// # Errors
    /// When a name or an embedding is unusable, or the gallery cannot be written to.
    pub fn enrol(&mut self, faces: &[NewFace]) -> Result<Vec<Added>> {
        faces.iter().try_for_each(|face| self.check_new(face))?;
        if faces.is_empty() {
            return Ok(Vec::new());
        }
        let path = self.path().to_owned();
        self.change(|transaction| {
            let added: rusqlite::Result<Vec<Added>> = faces.iter().map(|face| add(transaction, face)).collect();
            let added = added.map_err(|error| failure(&path, &error))?;
            let has_changed = added.iter().any(|added| matches!(added, Added::New(_)));
            Ok((added, has_changed))
        })
    }

    /// Checks a face before it is written.
    fn check_new(&self, face: &NewFace) -> Result<()> {
        check_name(&face.person).map_err(|what| self.wrong(what))?;
        let dim = self.model().embedding_size;
        let length = face.embedding.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        if face.embedding.len() != dim || (length - 1.0).abs() > 1e-3 || length.is_nan() {
            let (found, source) = (face.embedding.len(), &face.source);
            return Err(self.wrong(format!(
                "{source}: expected an embedding of {dim} elements and length 1, found {found} of length {length:.3}"
            )));
        }
        Ok(())
    }

    /// Whether a person has a photo with this SHA-256.
    ///
    /// # Errors
    /// When the gallery cannot be read.
    pub fn has(&self, person: &str, image: &[u8; 32]) -> Result<bool> {
        let sql = "SELECT 1 FROM faces JOIN people ON people.id = person WHERE name = ?1 AND image = ?2";
        let found = self.db.prepare_cached(sql).and_then(|mut query| query.exists(params![person, image]));
        found.map_err(self.failed())
    }

    /// Returns the people by name.
    ///
    /// # Errors
    /// When the gallery cannot be read.
    pub fn people(&self) -> Result<Vec<Person>> {
        let sql = "SELECT name, count(*), min(enrolled), max(enrolled) FROM people JOIN faces ON people.id = person
                   GROUP BY people.id ORDER BY name";
        let read = |row: &Row| {
            Ok(Person {
                name: row.get(0)?,
                num_faces: row.get::<_, i64>(1)? as usize,
                first_enrolled: row.get(2)?,
                last_enrolled: row.get(3)?,
            })
        };
        let mut query = self.db.prepare(sql).map_err(self.failed())?;
        let people = query.query_map([], read).and_then(Iterator::collect);
        people.map_err(self.failed())
    }

    /// Returns the faces of a person, or of all, in the order of their numbers.
    ///
    /// # Errors
    /// When the gallery cannot be read, or the person is not in it.
    pub fn faces(&self, person: Option<&str>) -> Result<Vec<StoredFace>> {
        let sql = format!("{STORED_FACES} WHERE ?1 IS NULL OR name = ?1 ORDER BY faces.id");
        let mut query = self.db.prepare(&sql).map_err(self.failed())?;
        let faces: Vec<StoredFace> =
            query.query_map([person], stored_face).and_then(Iterator::collect).map_err(self.failed())?;
        match person {
            Some(person) if faces.is_empty() => Err(self.wrong(no_person(person))),
            _ => Ok(faces),
        }
    }

    /// Returns one face.
    ///
    /// # Errors
    /// When the gallery cannot be read, or has no such face.
    pub fn face(&self, id: i64) -> Result<StoredFace> {
        let sql = format!("{STORED_FACES} WHERE faces.id = ?1");
        let mut query = self.db.prepare_cached(&sql).map_err(self.failed())?;
        let face = query.query_row([id], stored_face).optional().map_err(self.failed())?;
        face.ok_or_else(|| self.wrong(no_face(id)))
    }

    /// Removes people with all their faces. What is removed is overwritten with zeros in the file at once; the columns
    /// of searches go too.
    ///
    /// # Errors
    /// When one of them is not in the gallery: then nobody is removed; or it cannot be written to.
    pub fn remove_people(&mut self, people: &[String]) -> Result<Removed> {
        let of_person = "DELETE FROM faces WHERE person = (SELECT id FROM people WHERE name = ?1)";
        self.remove(people, of_person, |person| no_person(person))
    }

    /// Removes single faces, and people of whom none is left.
    ///
    /// # Errors
    /// As [`Self::remove_people`].
    pub fn remove_faces(&mut self, faces: &[i64]) -> Result<Removed> {
        self.remove(faces, "DELETE FROM faces WHERE id = ?1", |face| no_face(*face))
    }

    /// Removes what `sql` removes for each of `all`, and people without faces. Where it removes nothing, `missing` says
    /// what is not there, and all stays.
    fn remove<T: ToSql + Ord>(&mut self, all: &[T], sql: &str, missing: impl Fn(&T) -> String) -> Result<Removed> {
        let path = self.path().to_owned();
        let failed = |error| failure(&path, &error);
        let num_faces = self.change(|transaction| {
            let mut num = 0;
            for one in all.iter().collect::<BTreeSet<_>>() {
                match transaction.execute(sql, [one]).map_err(failed)? {
                    0 => return Err(gallery_error(&path, missing(one))),
                    faces => num += faces,
                }
            }
            let people = "DELETE FROM people WHERE id NOT IN (SELECT person FROM faces)";
            transaction.execute(people, []).map_err(failed)?;
            // Nobody puts a column in place meanwhile, nor one made before afterwards: the state is another then.
            remove_columns(&path)?;
            Ok((num, num > 0))
        })?;
        Ok(Removed { num_faces, is_log_empty: self.empty_log()? })
    }

    /// Calls `each` with the faces in the order of their numbers, after a check of each, as they are at one moment;
    /// returns the state at that moment. `by_person` orders them by person first.
    pub(super) fn for_each_record(
        &self,
        by_person: bool,
        mut each: impl FnMut(Record) -> Result<()>,
    ) -> Result<[u8; 16]> {
        let _snapshot = self.snapshot()?;
        let state = self.state()?;
        let order = if by_person { "person, id" } else { "id" };
        let sql = format!("SELECT {} FROM faces ORDER BY {order}", Record::COLUMNS);
        let mut query = self.db.prepare(&sql).map_err(self.failed())?;
        let mut rows = query.query([]).map_err(self.failed())?;
        while let Some(row) = rows.next().map_err(self.failed())? {
            let record = Record::read(row, self.model().embedding_size).map_err(self.failed())?;
            each(record.map_err(|what| self.wrong(what))?)?;
        }
        Ok(state)
    }

    /// Begins to see the gallery as it is now, whatever others write meanwhile, until the value is dropped.
    pub(super) fn snapshot(&self) -> Result<Transaction<'_>> {
        self.db.unchecked_transaction().map_err(self.failed())
    }

    /// Returns one face with its embedding, after a check; none if it was removed.
    pub(super) fn record(&self, id: i64) -> Result<Option<Record>> {
        let sql = format!("SELECT {} FROM faces WHERE id = ?1", Record::COLUMNS);
        let mut query = self.db.prepare_cached(&sql).map_err(self.failed())?;
        let dim = self.model().embedding_size;
        let record = query.query_row([id], |row| Record::read(row, dim)).optional().map_err(self.failed())?;
        record.transpose().map_err(|what| self.wrong(what))
    }

    /// Returns the embeddings of a person, in the order of the faces' numbers, after a check of each.
    pub(super) fn records_of(&self, person: i64) -> Result<Vec<Record>> {
        let sql = format!("SELECT {} FROM faces WHERE person = ?1 ORDER BY id", Record::COLUMNS);
        let mut query = self.db.prepare_cached(&sql).map_err(self.failed())?;
        let dim = self.model().embedding_size;
        let records = query.query_map([person], |row| Record::read(row, dim)).and_then(Iterator::collect);
        let records: Vec<Result<Record, String>> = records.map_err(self.failed())?;
        records.into_iter().map(|record| record.map_err(|what| self.wrong(what))).collect()
    }

    /// Returns what is wrong with the faces.
    pub(super) fn damaged_faces(&self) -> Result<Vec<String>> {
        let mut query =
            self.db.prepare(&format!("SELECT {} FROM faces ORDER BY id", Record::COLUMNS)).map_err(self.failed())?;
        let dim = self.model().embedding_size;
        let mut damaged = Vec::new();
        for record in query.query_map([], |row| Record::read(row, dim)).map_err(self.failed())? {
            match record {
                Ok(Ok(_)) => {}
                Ok(Err(what)) => damaged.push(what),
                Err(error) => {
                    damaged.push(error.to_string());
                    break;
                }
            }
        }
        Ok(damaged)
    }

    /// Calls `each` with every face and its embedding, in the order of their numbers.
    ///
    /// # Errors
    /// When the gallery cannot be read, a face is damaged, or `each` fails.
    pub fn for_each_face(&self, mut each: impl FnMut(StoredFace, &[f32]) -> Result<()>) -> Result<()> {
        self.for_each_record(false, |record| each(self.face(record.id)?, &record.embedding)).map(drop)
    }
}

/// Reads what [`stored_face`] takes.
const STORED_FACES: &str = "SELECT faces.id, name, source, enrolled, score, side, sharpness, mask
                            FROM faces JOIN people ON people.id = person";

fn no_person(name: &str) -> String {
    format!("expected a person {name}, found none")
}

fn no_face(id: i64) -> String {
    format!("expected a face {id}, found none")
}

fn stored_face(row: &Row) -> rusqlite::Result<StoredFace> {
    Ok(StoredFace {
        id: row.get(0)?,
        person: row.get(1)?,
        source: row.get(2)?,
        enrolled: row.get(3)?,
        score: row.get(4)?,
        side: row.get(5)?,
        sharpness: row.get(6)?,
        mask: row.get(7)?,
    })
}

/// Adds a face, and the person if they are new.
fn add(transaction: &Transaction, face: &NewFace) -> rusqlite::Result<Added> {
    transaction.prepare_cached("INSERT OR IGNORE INTO people (name) VALUES (?1)")?.execute([&face.person])?;
    let mut query = transaction.prepare_cached("SELECT id FROM people WHERE name = ?1")?;
    let person: i64 = query.query_row([&face.person], |row| row.get(0))?;
    let mut query = transaction.prepare_cached("SELECT id FROM faces WHERE person = ?1 AND image = ?2")?;
    if let Some(id) = query.query_row(params![person, face.image], |row| row.get(0)).optional()? {
        return Ok(Added::Known(id));
    }
    let embedding: Vec<u8> = face.embedding.iter().flat_map(|value| value.to_le_bytes()).collect();
    let numbers = [face.score, face.side, Some(face.sharpness), face.mask].map(|number| number.map(f64::from));
    let NewFace { image, source, enrolled, .. } = face;
    let checked = Checked { person, embedding: &embedding, image, source, enrolled: *enrolled, numbers };
    let checksum = checked.checksum();
    let sql = "INSERT INTO faces (person, embedding, image, source, enrolled, score, side, sharpness, mask, checksum)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
    transaction.prepare_cached(sql)?.execute(params![
        person,
        embedding,
        face.image,
        face.source,
        face.enrolled,
        face.score,
        face.side,
        face.sharpness,
        face.mask,
        checksum
    ])?;
    Ok(Added::New(transaction.last_insert_rowid()))
}

/// Checks a person's name: lists have one in a line.
fn check_name(name: &str) -> Result<(), String> {
    if name.trim().is_empty() || name.len() > LONGEST_NAME || name.contains(char::is_control) {
        let shown: String = name.chars().take(40).collect();
        return Err(format!(
            "expected a name of up to {LONGEST_NAME} bytes without control characters, found {shown:?}"
        ));
    }
    Ok(())
}

/// Returns the name of the person that a photo shows by its place: the folder it is in if that is below `root`, else
/// the file's own name.
///
/// # Errors
/// When a name is no UTF-8.
pub fn person_of(photo: &Path, root: &Path) -> Result<String> {
    let folder = photo.parent().filter(|folder| *folder != root && folder.starts_with(root) && photo != root);
    let name = folder.and_then(Path::file_name).or_else(|| photo.file_stem());
    let name = name.and_then(|name| name.to_str()).map(str::to_owned);
    name.ok_or_else(|| Error::Gallery { path: photo.to_owned(), what: "expected a name in UTF-8".to_owned() })
}
