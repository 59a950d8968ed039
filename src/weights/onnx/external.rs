//! Weights that an ONNX model keeps in files of their own, as PyTorch's exporter does by default.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;

/// Weights may take this many times the size of all files together: several may be the same bytes.
const MAX_GROWTH: u64 = 4;

/// The files of weights beside a model.
pub(super) struct External {
    folder: PathBuf,
    files: BTreeMap<String, Mmap>,
    /// Bytes that further weights may take.
    budget: u64,
}

/// Place of a weight in a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub location: String,
    pub offset: u64,
    pub length: Option<u64>,
}

impl External {
    /// Returns the files beside the model at `path`.
    pub fn beside(path: &Path) -> Self {
        Self { folder: crate::files::folder_of(path).to_owned(), files: BTreeMap::new(), budget: 0 }
    }

    /// Returns the bytes of a weight, which needs `num_bytes`.
    ///
    /// # Errors
    /// When the file is missing, lies elsewhere, is too short, or weights take far more memory than the files.
    pub fn read(&mut self, place: &Place, num_bytes: usize) -> Result<&[u8], String> {
        let Place { location, offset, length } = place;
        if length.is_some_and(|length| length != num_bytes as u64) {
            return Err(format!("expected {num_bytes} bytes in {location}, found {}", length.unwrap_or_default()));
        }
        if !self.files.contains_key(location) {
            let file = self.open(location)?;
            self.budget = self.budget.saturating_add((file.len() as u64).saturating_mul(MAX_GROWTH));
            self.files.insert(location.clone(), file);
        }
        let bytes: &[u8] = &self.files[location];
        let start = usize::try_from(*offset).ok();
        let range = start.and_then(|start| bytes.get(start..start.checked_add(num_bytes)?));
        let budget = self.budget.checked_sub(if range.is_some() { num_bytes as u64 } else { 0 });
        self.budget = budget.ok_or("expected weights of about the size of their files, found far larger ones")?;
        range.ok_or_else(|| {
            let len = bytes.len();
            format!(
                "expected {num_bytes} bytes at byte {offset} of {location}, which ends at byte {len}: it is truncated, \
                 or another model's"
            )
        })
    }

    /// Returns the contents of the files that were read.
    pub fn contents(self) -> BTreeMap<String, Vec<u8>> {
        self.files.into_iter().map(|(name, file)| (name, file.to_vec())).collect()
    }

    fn open(&self, location: &str) -> Result<Mmap, String> {
        let is_inside =
            Path::new(location).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if location.is_empty() || !is_inside {
            return Err(format!("expected a file of weights beside the model, found {location:?}"));
        }
        let path = self.folder.join(location);
        let file = File::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                format!("its weights are in {location}, which is not beside it: copy both files")
            }
            _ => format!("{}: {e}", path.display()),
        })?;
        // A link must not lead out of the folder either.
        let is_within = match (path.canonicalize(), self.folder.canonicalize()) {
            (Ok(path), Ok(folder)) => path.starts_with(folder),
            _ => false,
        };
        if !is_within || !file.metadata().is_ok_and(|data| data.is_file()) {
            return Err(format!("expected a file of weights beside the model, found {}", path.display()));
        }
        // SAFETY: the map is only read, and dropped before the model is returned. If another program changes the file
        // meanwhile, numbers are wrong or a bus error follows, as with every reader that maps files.
        unsafe { Mmap::map(&file) }.map_err(|e| format!("{}: {e}", path.display()))
    }
}
