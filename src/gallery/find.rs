//! Searches for a face's person in a gallery.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use serde::Serialize;

use super::column::{Column, ColumnKind, ColumnWriter, Origin, temporary};
use super::faces::{Record, StoredFace};
use super::store::Gallery;
use crate::error::{Error, Result};
use crate::files::persist;
use crate::ops::search::dot;

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
        ColumnKind::F32 | ColumnKind::F16 => top.saturating_add(8),
        ColumnKind::Int8 => top.saturating_mul(8).saturating_add(32),
    }
}

/// Most faces of a person whose scores are computed again: the best is among the first.
const FACES_OF_ONE: usize = 8;

impl<'a> Finder<'a> {
    /// Maps the gallery's column, or writes it if the gallery was changed. Where it cannot be written beside the
    /// gallery, it becomes a temporary file without a name.
    ///
    /// # Errors
    /// When the gallery cannot be read, a face is damaged, or the column cannot be written.
    pub fn new(gallery: &'a Gallery, kind: ColumnKind, pool: Pool) -> Result<Self> {
        let is_pooled = pool == Pool::Mean;
        let path = Column::path_beside(gallery.path(), kind, is_pooled);
        let origin = Origin { state: gallery.state()?, is_pooled };
        let there = File::open(&path).ok().and_then(|file| Column::open(&file, &path).ok());
        let layout = (kind, gallery.model().embedding_size);
        let column = match there.filter(|column| (column.origin(), column.layout()) == (origin, layout)) {
            Some(column) => column,
            None => write(gallery, &path, kind, is_pooled)?,
        };
        Ok(Self { gallery, column, pool, kind })
    }

    /// Number of faces, or of people whose faces are pooled: a query is compared with each.
    pub fn num_rows(&self) -> usize {
        self.column.num_rows()
    }

    /// Returns the `top` people of the highest scores for each query, the highest first; fewer if there are fewer.
    ///
    /// - `queries`: `(m, embedding_size)`, row-major, of length 1
    ///
    /// # Errors
    /// When the queries have another length or are not finite, or a face is damaged.
    pub fn search(&self, queries: &[f32], top: usize) -> Result<Vec<Vec<Candidate>>> {
        self.search_above(queries, top, &|_, _| 0.0)
    }

    /// Like [`Self::search`], but ranks by how far a score is above the threshold for it: `threshold(query, mask)` of the
    /// query's number and the score of the mask head of the gallery's face, none if it is not known, as of a mean.
    ///
    /// # Errors
    /// As [`Self::search`].
    pub fn search_above(
        &self,
        queries: &[f32],
        top: usize,
        threshold: &dyn Fn(usize, Option<f32>) -> f64,
    ) -> Result<Vec<Vec<Candidate>>> {
        let dim = self.gallery.model().embedding_size;
        if queries.iter().any(|value| !value.is_finite()) {
            return Err(self.gallery.wrong("expected finite queries".to_owned()));
        }
        let _snapshot = self.gallery.snapshot()?;
        // More people than there are would be looked for in vain, among all rows.
        let top = top.min(self.gallery.num_people()?);
        let first = num_rows(top, self.kind);
        let mut found = self.column.search(queries, first)?;
        let mut results = Vec::with_capacity(found.len());
        for (k, (query, hits)) in queries.chunks_exact(dim).zip(&mut found).enumerate() {
            let mut wanted = first;
            // Many rows may be one person's.
            while wanted < self.column.num_rows() && self.num_people(hits.iter().map(|hit| hit.row)) < top {
                wanted = wanted.saturating_mul(4);
                *hits = self.column.search(query, wanted)?.swap_remove(0);
            }
            let rows = hits.iter().map(|hit| self.column.row(hit.row));
            results.push(self.ranked(query, rows, top, &|mask| threshold(k, mask))?);
        }
        Ok(results)
    }

    fn num_people(&self, rows: impl Iterator<Item = usize>) -> usize {
        rows.map(|row| self.column.row(row).1).collect::<BTreeSet<i64>>().len()
    }

    /// Computes the scores of rows again and ranks their people.
    fn ranked(
        &self,
        query: &[f32],
        rows: impl Iterator<Item = (i64, i64)>,
        top: usize,
        threshold: &dyn Fn(Option<f32>) -> f64,
    ) -> Result<Vec<Candidate>> {
        let mut best: BTreeMap<i64, Ranked> = BTreeMap::new();
        let mut num_faces: BTreeMap<i64, usize> = BTreeMap::new();
        for (face, person) in rows {
            let num = num_faces.entry(person).or_default();
            *num += 1;
            if *num > FACES_OF_ONE {
                continue;
            }
            // A face that was removed after the column was made is no candidate.
            let ranked = match self.pool {
                Pool::Best => self.gallery.record(face)?.map(|record| {
                    let score = dot(query, &record.embedding);
                    Ranked { above: score - threshold(record.mask), score, face }
                }),
                Pool::Mean => {
                    let records = self.gallery.records_of(person)?;
                    nearest(query, &records).map(|face| {
                        let score = dot(query, &mean(&records));
                        Ranked { above: score - threshold(None), score, face }
                    })
                }
            };
            if let Some(ranked) = ranked.filter(|ranked| best.get(&person).is_none_or(|b| ranked.is_before(b))) {
                best.insert(person, ranked);
            }
        }
        let mut ranked: Vec<Ranked> = best.into_values().collect();
        ranked.sort_by(|a, b| b.above.total_cmp(&a.above).then(a.face.cmp(&b.face)));
        ranked.truncate(top);
        let candidate = |ranked: Ranked| {
            let face = self.gallery.face(ranked.face)?;
            Ok(Candidate { person: face.person.clone(), score: ranked.score, face })
        };
        ranked.into_iter().map(candidate).collect()
    }
}

/// A person's best face so far.
struct Ranked {
    /// How far the score is above the threshold for it.
    above: f64,
    score: f64,
    face: i64,
}

impl Ranked {
    fn is_before(&self, other: &Self) -> bool {
        (self.above, -self.face) > (other.above, -other.face)
    }
}

/// The face with the highest score.
fn nearest(query: &[f32], records: &[Record]) -> Option<i64> {
    let score = |record: &Record| dot(query, &record.embedding);
    records.iter().max_by(|a, b| score(a).total_cmp(&score(b))).map(|record| record.id)
}

/// Returns the mean of embeddings, scaled to length 1.
fn mean(records: &[Record]) -> Vec<f32> {
    let dim = records.first().map_or(0, |record| record.embedding.len());
    let sum = |i: usize| records.iter().map(|record| f64::from(record.embedding[i])).sum::<f64>();
    let sums: Vec<f64> = (0..dim).map(sum).collect();
    let length = sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    sums.into_iter().map(|sum| (sum / length) as f32).collect()
}

/// Writes a column and maps it: beside the gallery, or else, in a folder that is full or not ours, as a temporary file
/// without a name.
fn write(gallery: &Gallery, path: &Path, kind: ColumnKind, is_pooled: bool) -> Result<Column> {
    let beside = || {
        let file = temporary(gallery.path())?;
        let state = fill(gallery, file.as_file(), path, kind, is_pooled)?;
        let column = Column::open(file.as_file(), path)?;
        // What is no longer there must not come back: a removal deletes the columns that it finds.
        let placed = gallery.if_still(state, || persist(file, path));
        match placed {
            Err(error @ Error::Io { .. }) => Err(error),
            // Others write all the time, or nobody may: this search has its column.
            _ => Ok(column),
        }
    };
    match beside() {
        Err(Error::Io { .. }) => {
            let file = tempfile::tempfile().map_err(Error::io(path))?;
            fill(gallery, &file, path, kind, is_pooled)?;
            Column::open(&file, path)
        }
        done => done,
    }
}

/// Writes all embeddings; returns the state of the gallery that they are of.
fn fill(gallery: &Gallery, file: &File, path: &Path, kind: ColumnKind, is_pooled: bool) -> Result<[u8; 16]> {
    let mut writer = ColumnWriter::new(file, path, kind, gallery.model().embedding_size)?;
    let mut of_person: Vec<Record> = Vec::new();
    let mut add = |record: Record| {
        if !is_pooled {
            return writer.push(record.id, record.person, &record.embedding);
        }
        if let Some(person) = of_person.first().map(|first| first.person).filter(|person| *person != record.person) {
            writer.push(0, person, &mean(&of_person))?;
            of_person.clear();
        }
        of_person.push(record);
        Ok(())
    };
    let state = gallery.for_each_record(is_pooled, &mut add)?;
    if let Some(person) = of_person.first().map(|first| first.person) {
        writer.push(0, person, &mean(&of_person))?;
    }
    writer.finish(Origin { state, is_pooled })?;
    Ok(state)
}
