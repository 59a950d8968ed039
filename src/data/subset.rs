//! A data set restricted to some of its identities or images.

use std::path::Path;
use std::sync::Arc;

use super::{Dataset, Sample};
use crate::error::{Error, Result};

/// Selection of identities; the default keeps all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IdentityFilter {
    /// Identities with fewer images are left out.
    pub min_images: usize,
    /// Names of the identities to keep, all of which must exist; `None` keeps every identity.
    pub names: Option<Vec<String>>,
}

/// Some identities or images of a data set, with labels numbered anew from 0.
pub struct Subset {
    inner: Arc<dyn Dataset>,
    /// Indices in `inner` of the kept images, ascending.
    images: Vec<u32>,
    /// Labels in `inner` of the kept identities, ascending.
    identities: Vec<u32>,
    num_skipped: usize,
}

impl Subset {
    /// Returns the part of `inner` that passes `filter`; `path` is the set's origin for error messages.
    ///
    /// # Errors
    /// When `filter` names an identity that the set lacks or leaves no identity, or there are over four billion images.
    pub fn new(inner: Arc<dyn Dataset>, filter: &IdentityFilter, path: &Path) -> Result<Self> {
        let error = |what: String| Error::Data { path: path.to_owned(), what };
        if u32::try_from(inner.len()).is_err() {
            return Err(error("more than four billion images".to_owned()));
        }
        let mut is_wanted = vec![filter.names.is_none(); inner.num_identities()];
        if let Some(names) = &filter.names {
            let mut sorted: Vec<&str> = names.iter().map(String::as_str).collect();
            sorted.sort_unstable();
            sorted.dedup();
            let mut is_found = vec![false; sorted.len()];
            for (label, is_wanted) in (0..).zip(&mut is_wanted) {
                if let Ok(at) = sorted.binary_search(&inner.identity_name(label).as_str()) {
                    (is_found[at], *is_wanted) = (true, true);
                }
            }
            if let Some(missing) = is_found.iter().position(|found| !found) {
                return Err(error(format!("expected images of identity {}, found none", sorted[missing])));
            }
        }
        Self::of(inner, &is_wanted, filter.min_images).ok_or_else(|| {
            let (num, least) = (is_wanted.len(), filter.min_images);
            error(format!("the filter leaves none of {num} identities (at least {least} images each)"))
        })
    }

    /// Returns the identities that are wanted (by label) and have at least `min_images` images; `None` if there are
    /// none, or if there are over four billion images.
    pub(super) fn of(inner: Arc<dyn Dataset>, is_wanted: &[bool], min_images: usize) -> Option<Self> {
        let num_images = u32::try_from(inner.len()).ok()?;
        let counts = inner.images_per_identity();
        let mut label_of: Vec<Option<u32>> = vec![None; counts.len()];
        let (mut identities, mut num_skipped) = (Vec::new(), 0);
        for label in (0..counts.len()).filter(|&label| is_wanted[label]) {
            if counts[label] < min_images {
                num_skipped += 1;
                continue;
            }
            label_of[label] = Some(identities.len() as u32);
            identities.push(label as u32);
        }
        if identities.is_empty() {
            return None;
        }
        let is_in = |&i: &u32| label_of[inner.label(i as usize) as usize].is_some();
        let images = (0..num_images).filter(is_in).collect();
        Some(Self { inner, images, identities, num_skipped })
    }

    /// Returns the images of `inner` whose indices are `kept`, in ascending order, and their identities; `None` if
    /// there are none, or if there are over four billion.
    pub fn of_images(inner: Arc<dyn Dataset>, kept: &[usize]) -> Option<Self> {
        let images = kept.iter().map(|&i| u32::try_from(i).ok()).collect::<Option<Vec<_>>>()?;
        let mut identities: Vec<u32> = kept.iter().map(|&i| inner.label(i)).collect();
        identities.sort_unstable();
        identities.dedup();
        let num_skipped = inner.num_identities() - identities.len();
        (!images.is_empty()).then_some(Self { inner, images, identities, num_skipped })
    }

    fn at(&self, index: usize) -> usize {
        self.images[index] as usize
    }
}

impl Dataset for Subset {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn num_identities(&self) -> usize {
        self.identities.len()
    }

    fn num_skipped_identities(&self) -> usize {
        self.num_skipped
    }

    fn label(&self, index: usize) -> u32 {
        let label = self.inner.label(self.at(index));
        self.identities.partition_point(|&identity| identity < label) as u32
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(self.at(index))
    }

    fn identity_name(&self, label: u32) -> String {
        self.inner.identity_name(self.identities[label as usize])
    }

    fn file_name(&self, index: usize) -> Option<String> {
        self.inner.file_name(self.at(index))
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        self.inner.encoded(self.at(index))
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.inner.encoded_len(self.at(index))
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let sample = self.inner.get(self.at(index))?;
        Ok(Sample { label: self.label(index), ..sample })
    }
}
