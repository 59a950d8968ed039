//! Galleries: the people whom a face is searched among. A gallery is one SQLite file; searches read a column of its
//! embeddings beside it, which is made anew after a change.

mod column;
mod faces;
mod find;
#[cfg(feature = "parquet")]
mod parquet;
mod store;
#[cfg(test)]
mod tests;

use crc::{CRC_32_ISCSI, Crc};

pub use column::ColumnKind;
pub use faces::{Added, NewFace, Person, Removed, StoredFace, person_of};
pub use find::{Candidate, Finder, Pool};
#[cfg(feature = "parquet")]
pub use parquet::export_parquet;
pub use store::{Gallery, GalleryInfo, GalleryModel};

/// What tells whether bytes are as they were written.
static CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
