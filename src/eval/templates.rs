//! Templates: one embedding of several images of a person, as insightface evaluates IJB-B and IJB-C.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::comparisons::Comparisons;
use super::embed::Embeddings;
use crate::data::{TemplateImage, TemplatePair};
use crate::error::{Error, Result};

/// The embeddings of templates, of length 1.
#[derive(Clone, Debug)]
pub struct Templates {
    row_of: BTreeMap<u32, usize>,
    embeddings: Embeddings,
}

impl Templates {
    /// Returns the templates of `images`: each image's embedding times its quality, the mean over the images of one media, the sum
    /// over the medias, scaled to length 1 (insightface, `image2template_feature`).
    ///
    /// `features` are the images' embeddings in their order, not normalised: with `f(x) + f(flip x)` and the quality that is its
    /// test mode N1D1F2, the published figures'.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when there is not one embedding for each image, or a template's embedding is zero.
    pub fn pool(images: &[TemplateImage], features: &Embeddings) -> Result<Self> {
        if features.len() != images.len() {
            let what = format!("expected {} embeddings, one for each image, found {}", images.len(), features.len());
            return Err(Error::Evaluation(what));
        }
        let mut members: BTreeMap<u32, BTreeMap<u32, Vec<usize>>> = BTreeMap::new();
        for (i, image) in images.iter().enumerate() {
            members.entry(image.template).or_default().entry(image.media).or_default().push(i);
        }
        let dim = features.dim();
        let (mut values, mut row_of) = (Vec::with_capacity(members.len() * dim), BTreeMap::new());
        for (template, medias) in members {
            let mut sum = vec![0f64; dim];
            for images_of_media in medias.values() {
                for &i in images_of_media {
                    let weight = f64::from(images[i].quality) / images_of_media.len() as f64;
                    sum.iter_mut().zip(features.row(i)).for_each(|(sum, v)| *sum += weight * f64::from(*v));
                }
            }
            let length = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
            if length <= 0.0 {
                let what = format!("template {template}: expected a direction, found a sum of zero: its scores are 0");
                return Err(Error::Evaluation(what));
            }
            row_of.insert(template, row_of.len());
            values.extend(sum.iter().map(|v| (v / length) as f32));
        }
        Ok(Self { row_of, embeddings: Embeddings::new(values, dim)? })
    }

    /// The embeddings, in the order of the templates' numbers.
    pub fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    /// Returns the embeddings of some templates, a row each.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when there is no template of such a number.
    pub fn rows(&self, templates: impl Iterator<Item = u32>) -> Result<Embeddings> {
        let rows = templates.map(|template| self.row(template)).collect::<Result<Vec<_>>>()?;
        Ok(self.embeddings.select(rows))
    }

    /// Returns the cosine of every pair; `people` says whose templates are, as far as that is known.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when there is no template of such a number.
    pub fn compare(&self, pairs: &[TemplatePair], people: &BTreeMap<u32, u32>) -> Result<Comparisons> {
        let score = |pair: &TemplatePair| {
            let (a, b) = (self.row(pair.a)?, self.row(pair.b)?);
            Ok(self.embeddings.cosine(a, &self.embeddings, b))
        };
        let scores = pairs.par_iter().map(score).collect::<Result<_>>()?;
        let both = |pair: &TemplatePair| {
            let both = [*people.get(&pair.a)?, *people.get(&pair.b)?];
            ((both[0] == both[1]) == pair.is_same).then_some(both)
        };
        Comparisons::new(scores, pairs.iter().map(|p| p.is_same).collect(), pairs.iter().map(both).collect())
    }

    fn row(&self, template: u32) -> Result<usize> {
        let missing = || Error::Evaluation(format!("template {template}: expected images of it, found none"));
        self.row_of.get(&template).copied().ok_or_else(missing)
    }
}
