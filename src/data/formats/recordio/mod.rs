//! MXNet's RecordIO as insightface packs faces: `NAME.rec`, with `NAME.idx` (where records begin) and `NAME.lst` (what
//! images were called) if there are.
//!
//! A record is a magic number, a word of three bits that say which part of a record this is and 29 that say its length,
//! the bytes, and padding to four bytes (dmlc-core, `recordio.h`). Its bytes are an image behind a header of 24 bytes
//! (MXNet's `IRHeader`).

mod index;
mod read;
mod record;
mod write;

pub use index::write_index;
pub use read::RecordFaces;
pub use write::write_records;
