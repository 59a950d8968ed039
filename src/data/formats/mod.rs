//! File formats of data sets: detection, reading and writing.

mod classes;
mod export;
mod file;
mod folder;
mod list;
mod list_form;
mod open;
#[cfg(feature = "parquet")]
mod parquet;
mod recordio;
mod verification;
mod webdataset;

pub use export::Export;
pub use folder::{FaceFolder, is_junk, write_folder};
pub use list::ListedFaces;
pub use open::{Format, Source, open_source, open_source_with};
#[cfg(feature = "parquet")]
pub use parquet::{ParquetFaces, write_parquet};
pub use recordio::{RecordFaces, check_records, write_index, write_records};
pub use verification::{VerificationFaces, write_verification};
pub use webdataset::{ShardFaces, write_shards};
