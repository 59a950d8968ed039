//! Faces to enrol or to search for.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::CommonArgs;
use crate::cli::device::Work;
use crate::error::Error;
use crate::eval::{EmbedConfig, Embeddings, embed_with_masks};
use crate::face::{Crop, Cropper, Face, sharpness};
use crate::gallery::{Gallery, GalleryModel};
use crate::models::Model;
use crate::parallel;

/// Faces whose embeddings are computed and written together.
pub(super) const BATCH: usize = 32;

/// The network and the detector of a command.
pub(super) struct Tools {
    pub model: Model,
    pub name: String,
    pub cropper: Arc<Cropper>,
}

/// Images that cannot be used, by their index, with the reason.
pub(super) type Unusable = Vec<(usize, Error)>;

/// A face with its embedding.
pub(super) struct Embedded {
    /// Index of its image.
    pub image: usize,
    pub face: Option<Face>,
    pub sharpness: f32,
    pub mask: Option<f32>,
    pub embedding: Vec<f32>,
}

impl Tools {
    /// Opens the model: the one that was named, or else the gallery's.
    pub fn open(args: &CommonArgs, gallery: Option<&Gallery>) -> Result<Self> {
        args.threads.start()?;
        let machine = args.device.open(Work::Inference)?;
        let name = match (&args.model, gallery) {
            (Some(name), _) => whole(name),
            (None, Some(gallery)) => gallery.model().name.clone(),
            (None, None) => bail!("a new gallery: expected --model, the network of its embeddings"),
        };
        let opened = args.hub.load_with_notes(&name);
        let from = || match args.model {
            Some(_) => name.clone(),
            None => format!("{name}, the gallery's model: --model names it elsewhere"),
        };
        let model = args.device.place(opened.with_context(from)?.model, &machine);
        let cropper = args.photos.cropper(args.which.which, model.config().input_size, &args.hub)?;
        Ok(Self { model, name, cropper })
    }

    /// Describes the network for a gallery.
    pub fn gallery_model(&self) -> Result<GalleryModel> {
        let (name, embedding_size) = (self.name.clone(), self.model.config().embedding_size);
        Ok(GalleryModel { name, embedding_size, computed_with: self.model.computed_with()? })
    }

    /// Embeds the faces of a few images, of which `read` returns the crops. Returns those, in order, and the images that
    /// cannot be used.
    pub fn embed(
        &self,
        num: usize,
        read: impl Fn(usize) -> crate::Result<Crop> + Sync,
    ) -> Result<(Vec<Embedded>, Unusable)> {
        let (mut usable, mut unusable): (Vec<(usize, Crop)>, Unusable) = (Vec::new(), Vec::new());
        for (image, crop) in parallel::map(num, read).into_iter().enumerate() {
            match crop {
                Ok(crop) => usable.push((image, crop)),
                Err(error) if error.is_of_image() => unusable.push((image, error)),
                Err(error) => return Err(error.into()),
            }
        }
        if usable.is_empty() {
            return Ok((Vec::new(), unusable));
        }
        let crop = |k: usize| Ok(usable[k].1.image.clone());
        let config = EmbedConfig::default();
        let (embeddings, masks): (Embeddings, _) = embed_with_masks(&self.model, usable.len(), crop, config, |_| ())?;
        let embedded = usable.into_iter().enumerate().map(|(k, (image, crop))| {
            let (mask, embedding) = (masks.as_ref().map(|masks| masks[k]), embeddings[k].to_vec());
            Embedded { image, sharpness: sharpness(&crop.image), face: crop.face, mask, embedding }
        });
        Ok((embedded.collect(), unusable))
    }
}

/// Returns the whole path of a model's file, so that the gallery finds it from any folder; other names stay.
fn whole(name: &str) -> String {
    let path = Path::new(name);
    let whole = path.exists().then(|| path.canonicalize().ok()).flatten();
    whole.and_then(|path| path.to_str().map(str::to_owned)).unwrap_or_else(|| name.to_owned())
}
