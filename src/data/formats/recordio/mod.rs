//! MXNet's RecordIO as insightface packs faces: `NAME.rec`, with `NAME.idx` (offsets of the records) and `NAME.lst`
//! (paths of the images) if they exist.
//!
//! A record is a magic number, a word with three bits for the kind of part and 29 bits for its length, the bytes, and
//! padding to four bytes (dmlc-core, `recordio.h`). Its bytes are a header of 24 bytes (MXNet's `IRHeader`) followed by
//! an image.

mod index;
mod read;
mod record;
mod write;

pub use index::write_index;
pub use read::RecordFaces;
pub use write::{check_records, write_records};
