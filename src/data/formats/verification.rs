//! insightface's verification files: a pickle of encoded images, two per pair, and of flags that say whether each pair
//! shows the same person.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::export::Output;
use crate::data::dataset::Dataset;
use crate::data::{Pair, TestSet};
use crate::error::{Error, Result};
use crate::pickle::{Id, Pickle, Value};

/// Modules of the NumPy functions in pickles, before version 2 and since.
const NUMPY: [&str; 4] =
    ["numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"];

/// The images of a verification file as a [`Dataset`]. Each image has a label of its own, since the file does not name
/// people; the pairs say which images show the same person.
///
/// The images are kept in memory as stored. Every image has [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
pub struct VerificationFaces {
    path: PathBuf,
    images: Vec<Vec<u8>>,
    is_same: Vec<bool>,
}

impl VerificationFaces {
    /// Reads a pickle of `(images, is_same)`, a tuple or list, with images as bytes or NumPy arrays of bytes, in any
    /// protocol, including Python 2's. The pickle is read as data: nothing that it names is looked up or called.
    ///
    /// # Errors
    /// When the file cannot be read, is not a pickle, holds anything else, or does not have two images per pair.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let pickle = Pickle::read(&bytes).map_err(|e| e.in_file(path, 0))?;
        let error = |what: String| Error::Data { path: path.to_owned(), what };
        let root = pickle.elements(pickle.root()).unwrap_or_default();
        let &[images, is_same] = root else {
            let found = pickle.kind(pickle.root());
            return Err(error(format!("expected a pickle of images and of flags for pairs, found {found}")));
        };
        let image_ids = pickle.elements(images);
        let image_ids =
            image_ids.ok_or_else(|| error(format!("expected a list of images, found {}", pickle.kind(images))))?;
        let image = |(number, &id): (usize, &Id)| {
            let found = || format!("image {number}: expected bytes or an array of them, found {}", pickle.kind(id));
            let bytes = pickle.bytes(id).map(|bytes| bytes.into_owned());
            bytes.or_else(|| array(&pickle, id, &["u1", "B", "|u1"])).ok_or_else(|| error(found()))
        };
        let images: Vec<Vec<u8>> = image_ids.iter().enumerate().map(image).collect::<Result<_>>()?;
        let is_same = flags(&pickle, is_same).map_err(error)?;
        if images.len() != 2 * is_same.len() || is_same.is_empty() {
            let what = format!("expected two images for each pair, found {} for {} pairs", images.len(), is_same.len());
            return Err(error(what));
        }
        Ok(Self { path: path.to_owned(), images, is_same })
    }

    /// Whether each pair shows the same person.
    pub fn is_same(&self) -> &[bool] {
        &self.is_same
    }

    /// Returns the pairs as a test set, in the file's order and in `num_folds` consecutive folds.
    ///
    /// # Errors
    /// When there is no genuine or no impostor pair.
    pub fn into_test(self, num_folds: usize) -> Result<TestSet> {
        let description = format!("{} pairs of {}", self.is_same.len(), self.path.display());
        let pair = |(i, &is_same): (usize, &bool)| Pair {
            a: 2 * i,
            b: 2 * i + 1,
            is_same,
            fold: i * num_folds / self.is_same.len(),
        };
        let pairs = self.is_same.iter().enumerate().map(pair).collect();
        TestSet::new(std::sync::Arc::new(self), pairs, num_folds, description)
    }
}

impl Dataset for VerificationFaces {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn num_identities(&self) -> usize {
        self.images.len()
    }

    fn label(&self, index: usize) -> u32 {
        index as u32
    }

    fn name(&self, index: usize) -> String {
        format!("{}, image {index}", self.path.display())
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        Ok(Some(self.images[index].clone()))
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        Some(self.images[index].len() as u64)
    }
}

/// Reads the flags of the pairs: a list of bools, 0 and 1, or NumPy bools, or an array.
fn flags(pickle: &Pickle, id: Id) -> std::result::Result<Vec<bool>, String> {
    const BOOL: [&str; 3] = ["b1", "?", "|b1"];
    if let Some(bytes) = array(pickle, id, &BOOL).or_else(|| array(pickle, id, &["u1", "|u1"])) {
        return Ok(bytes.into_iter().map(|byte| byte != 0).collect());
    }
    let Some(ids) = pickle.elements(id) else {
        return Err(format!("expected a list of flags for pairs, found {}", pickle.kind(id)));
    };
    let flag = |(number, &id): (usize, &Id)| match pickle.get(id) {
        Value::Bool(is_same) => Ok(*is_same),
        Value::Int(number @ 0..=1) => Ok(*number == 1),
        _ => scalar(pickle, id, &BOOL)
            .ok_or_else(|| format!("pair {number}: expected a bool, found {}", pickle.kind(id))),
    };
    ids.iter().enumerate().map(flag).collect()
}

/// Returns the bytes of an array of one-byte elements of one of `types`, as NumPy pickles it.
fn array(pickle: &Pickle, id: Id, types: &[&str]) -> Option<Vec<u8>> {
    let Value::Object(object) = pickle.get(id) else { return None };
    let (module, function) = pickle.global(object.callable)?;
    if !NUMPY.contains(&module) {
        return None;
    }
    let (bytes, dtype, shape) = match (function, object.state) {
        // (version, shape, dtype, is_fortran, bytes)
        ("_reconstruct", Some(state)) => match pickle.elements(state)? {
            &[_, shape, dtype, _, bytes] => (bytes, dtype, shape),
            _ => return None,
        },
        // (bytes, dtype, shape, order), protocol 5
        ("_frombuffer", None) => match pickle.elements(object.args)? {
            &[bytes, dtype, shape, _] => (bytes, dtype, shape),
            _ => return None,
        },
        _ => return None,
    };
    let bytes = pickle.bytes(bytes)?;
    // insightface's own arrays are a row of bytes.
    let mut sizes = pickle.elements(shape)?.iter().map(|&size| u64::try_from(pickle.int(size)?).ok());
    let len = sizes.try_fold(1u64, |product, size| product.checked_mul(size?));
    let is_it = is_dtype(pickle, dtype, types) && len == Some(bytes.len() as u64);
    is_it.then(|| bytes.into_owned())
}

/// Returns a scalar of one of `types`, as NumPy pickles it.
fn scalar(pickle: &Pickle, id: Id, types: &[&str]) -> Option<bool> {
    let Value::Object(object) = pickle.get(id) else { return None };
    let (module, "scalar") = pickle.global(object.callable)? else { return None };
    let &[dtype, bytes] = pickle.elements(object.args)? else { return None };
    let &[byte] = pickle.bytes(bytes)?.as_ref() else { return None };
    (NUMPY.contains(&module) && is_dtype(pickle, dtype, types)).then_some(byte != 0)
}

fn is_dtype(pickle: &Pickle, id: Id, types: &[&str]) -> bool {
    let Value::Object(object) = pickle.get(id) else { return false };
    let name = pickle.elements(object.args).and_then(|args| pickle.text(*args.first()?));
    pickle.global(object.callable) == Some(("numpy", "dtype")) && name.is_some_and(|name| types.contains(&name))
}

/// Writes pairs as a verification file in pickle protocol 3, which `pickle.load` of any Python 3 reads. `on` receives
/// the number of images written so far; an error from it ends the writing.
///
/// # Errors
/// When an image cannot be read, or the file exists or cannot be written; no file is left then.
pub fn write_verification(
    images: &dyn Dataset,
    pairs: &[Pair],
    path: &Path,
    on: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<()> {
    let file = Output::new(path)?;
    let mut out = BufWriter::new(file.as_file());
    let io = |e| Error::io(path)(e);
    // PROTO 3, EMPTY_LIST, MARK; the images; APPENDS; EMPTY_LIST, MARK; the flags; APPENDS, TUPLE2, STOP.
    out.write_all(b"\x80\x03](").map_err(io)?;
    for (num_done, index) in pairs.iter().flat_map(|pair| [pair.a, pair.b]).enumerate() {
        on(num_done)?;
        let Some(bytes) = images.encoded(index)? else {
            let what = format!("{}: expected an encoded image, found a procedural one", images.name(index));
            return Err(Error::Data { path: path.to_owned(), what });
        };
        let len = u32::try_from(bytes.len()).map_err(|_| Error::Data {
            path: path.to_owned(),
            what: format!("an image of {} bytes is too large", bytes.len()),
        })?;
        out.write_all(b"B").and_then(|()| out.write_all(&len.to_le_bytes())).map_err(io)?;
        out.write_all(&bytes).map_err(io)?;
    }
    out.write_all(b"e](").map_err(io)?;
    for pair in pairs {
        out.write_all(if pair.is_same { b"\x88" } else { b"\x89" }).map_err(io)?;
    }
    out.write_all(b"e\x86.").and_then(|()| out.flush()).map_err(io)?;
    drop(out);
    file.finish()
}
