//! Searches for a face's person in a gallery.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use serde::Serialize;

use super::column::{Column, ColumnKind, ColumnWriter, Origin};
use super::faces::{Record, StoredFace};
use super::store::Gallery;
use crate::error::{Error, Result};
use crate::files::{persist, private_temporary};

/// How the faces of a person become one score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pool {
    /// The highest score of any of them.
    #[default]
    Best,
    /// The score of their mean embedding, scaled to length 1.
    Mean,
}

/// A person that a search found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// Name.
    pub person: String,
    /// Cosine, computed in f64 from the gallery's f32.
    pub score: f64,
    /// Face with the highest score.
    pub face: StoredFace,
}

/// A gallery made ready for searches, as it was at one moment.
#[derive(Debug)]
pub struct Finder<'a> {
    gallery: &'a Gallery,
    column: Column,
    pool: Pool,
    kind: ColumnKind,
}

/// Rows whose scores are computed again, for `top` people: quantised scores are out of order by a few places.
fn num_rows(top: usize, kind: ColumnKind) -> usize {
    match kind {
        ColumnKind::F32 | ColumnKind::F16 => top + 8,
        ColumnKind::Int8 => 8 * top + 32,
    }
}

impl<'a> Finder<'a> {
    /// Maps the gallery's column, or writes it if the gallery was changed. Where it cannot be written beside the
    /// gallery, it becomes a temporary file without a name.
    ///
    /// # Errors
    /// When the gallery cannot be read, a face is damaged, or the column cannot be written.
    pub fn new(gallery: &'a Gallery, kind: ColumnKind, pool: Pool) -> Result<Self> {
        let is_pooled = pool == Pool::Mean;
        let path = Column::path_beside(gallery.path(), kind, is_pooled);
        let id = gallery.id().as_bytes()[..16].try_into().expect("identifiers have 32 digits");
        let origin = Origin { gallery: id, changes: gallery.changes()?, is_pooled };
        let there = File::open(&path).ok().and_then(|file| Column::open(&file, &path).ok());
        let column = match there.filter(|column| column.origin() == origin) {
            Some(column) => column,
            None => write(gallery, &path, kind, origin)?,
        };
        Ok(Self { gallery, column, pool, kind })
    }

    /// Number of faces, or of people whose faces are pooled.
    pub fn num_rows(&self) -> usize {
        self.column.num_rows()
    }

    /// Returns the `top` people of the highest scores for each query, the highest first; fewer if there are fewer.
    ///
    /// - `queries`: `(m, embedding_size)`, row-major, of length 1
    ///
    /// # Errors
    /// When the queries have another length, or a face is damaged.
    pub fn search(&self, queries: &[f32], top: usize) -> Result<Vec<Vec<Candidate>>> {
        let dim = self.gallery.model().embedding_size;
        let mut wanted = num_rows(top, self.kind);
        let mut found = self.column.search(queries, wanted)?;
        let queries = queries.chunks_exact(dim);
        let mut results = Vec::with_capacity(found.len());
        for (query, hits) in queries.zip(&mut found) {
            // Many rows may be one person's.
            while self.num_people(hits.iter().map(|hit| hit.row)) < top && hits.len() < self.column.num_rows() {
                wanted = (4 * wanted).min(self.column.num_rows());
                *hits = self.column.search(query, wanted)?.swap_remove(0);
            }
            let rows = hits.iter().map(|hit| self.column.row(hit.row));
            results.push(self.ranked(query, rows, top)?);
        }
        Ok(results)
    }

    fn num_people(&self, rows: impl Iterator<Item = usize>) -> usize {
        let mut people: Vec<i64> = rows.map(|row| self.column.row(row).1).collect();
        people.sort_unstable();
        people.dedup();
        people.len()
    }

    /// Computes the scores of rows again and ranks their people.
    fn ranked(&self, query: &[f32], rows: impl Iterator<Item = (i64, i64)>, top: usize) -> Result<Vec<Candidate>> {
        let mut best: BTreeMap<i64, (f64, i64)> = BTreeMap::new();
        let mut offer = |person, score: f64, face| {
            let entry = best.entry(person).or_insert((score, face));
            if (score, -face) > (entry.0, -entry.1) {
                *entry = (score, face);
            }
        };
        for (face, person) in rows {
            match self.pool {
                // A face that was removed meanwhile is no candidate.
                Pool::Best => {
                    if let Some(record) = self.gallery.record(face)? {
                        offer(person, dot(query, &record.embedding), face);
                    }
                }
                Pool::Mean => {
                    let records = self.gallery.records_of(person)?;
                    if let Some(nearest) = nearest(query, &records) {
                        offer(person, dot(query, &mean(&records)), nearest);
                    }
                }
            }
        }
        let mut ranked: Vec<(f64, i64)> = best.into_values().collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        ranked.truncate(top);
        let candidate = |(score, face)| {
            let face = self.gallery.face(face)?;
            Ok(Candidate { person: face.person.clone(), score, face })
        };
        ranked.into_iter().map(candidate).collect()
    }
}

/// The face with the highest score.
fn nearest(query: &[f32], records: &[Record]) -> Option<i64> {
    let score = |record: &Record| dot(query, &record.embedding);
    records.iter().max_by(|a, b| score(a).total_cmp(&score(b))).map(|record| record.id)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Returns the mean of embeddings, scaled to length 1.
fn mean(records: &[Record]) -> Vec<f32> {
    let dim = records.first().map_or(0, |record| record.embedding.len());
    let sum = |i: usize| records.iter().map(|record| f64::from(record.embedding[i])).sum::<f64>();
    let sums: Vec<f64> = (0..dim).map(sum).collect();
    let length = sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    sums.into_iter().map(|sum| (sum / length) as f32).collect()
}

/// Writes a column and maps it.
fn write(gallery: &Gallery, path: &Path, kind: ColumnKind, origin: Origin) -> Result<Column> {
    match private_temporary(path) {
        Ok(file) => {
            fill(gallery, file.as_file(), path, kind, origin)?;
            let column = Column::open(file.as_file(), path)?;
            persist(file, path)?;
            Ok(column)
        }
        Err(_) => {
            let file = tempfile::tempfile().map_err(Error::io(path))?;
            fill(gallery, &file, path, kind, origin)?;
            Column::open(&file, path)
        }
    }
}

fn fill(gallery: &Gallery, file: &File, path: &Path, kind: ColumnKind, origin: Origin) -> Result<()> {
    let mut writer = ColumnWriter::new(file, path, kind, gallery.model().embedding_size)?;
    let mut by_person: BTreeMap<i64, Vec<Record>> = BTreeMap::new();
    let changes = gallery.for_each_record(|record| {
        if origin.is_pooled {
            by_person.entry(record.person).or_default().push(record);
            return Ok(());
        }
        writer.push(record.id, record.person, &record.embedding)
    })?;
    for (person, records) in by_person {
        writer.push(0, person, &mean(&records))?;
    }
    writer.finish(Origin { changes, ..origin })
}
