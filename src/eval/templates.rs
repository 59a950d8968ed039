//! Templates: several images of a person pooled into one embedding, as in insightface's IJB-B and IJB-C evaluation.

use std::collections::BTreeMap;

use super::comparisons::Comparisons;
use super::embed::Embeddings;
use crate::data::{TemplateImage, TemplatePair};
use crate::error::{Error, Result};
use crate::ops::search::dot;
use crate::parallel;

/// Template embeddings of length 1.
#[derive(Clone, Debug)]
pub struct Templates {
    row_of: BTreeMap<u32, usize>,
    embeddings: Embeddings,
}

impl Templates {
    /// Pools image embeddings into templates: each embedding is multiplied by its image's quality, averaged over the
    /// images of one media, summed over the media and scaled to length 1 (insightface, `image2template_feature`).
    ///
    /// `features` are the embeddings of `images` in the same order, not normalised. With `f(x) + f(flip x)` as the
    /// embedding, this is insightface's test mode N1D1F2, which the published figures use.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when the numbers of embeddings and images differ, or a template's embedding is zero.
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
                    sum.iter_mut().zip(&features[i]).for_each(|(sum, v)| *sum += weight * f64::from(*v));
                }
            }
            let length = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
            if length <= 0.0 {
                let what = format!("template {template}: expected a non-zero embedding, found 0: is every quality 0?");
                return Err(Error::Evaluation(what));
            }
            row_of.insert(template, row_of.len());
            values.extend(sum.iter().map(|v| (v / length) as f32));
        }
        Ok(Self { row_of, embeddings: Embeddings::new(values, dim)? })
    }

    /// The embeddings, in ascending order of template number.
    pub fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    /// Returns the embeddings of the given templates, one per row.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when a template is unknown.
    pub fn rows(&self, templates: impl Iterator<Item = u32>) -> Result<Embeddings> {
        let rows = templates.map(|template| self.row(template)).collect::<Result<Vec<_>>>()?;
        Ok(self.embeddings.select(rows))
    }

    /// Returns the cosine of every pair. `people` maps templates to identities where these are known; the result has
    /// identities only if those of every pair are known and agree with `is_same`.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when a template is unknown.
    pub fn compare(&self, pairs: &[TemplatePair], people: &BTreeMap<u32, u32>) -> Result<Comparisons> {
        let score = |pair: usize| -> Result<f64> {
            let (a, b) = (self.row(pairs[pair].a)?, self.row(pairs[pair].b)?);
            Ok(dot(&self.embeddings[a], &self.embeddings[b]))
        };
        let scores = parallel::try_map(pairs.len(), score)?;
        let both = |pair: &TemplatePair| {
            let both = [*people.get(&pair.a)?, *people.get(&pair.b)?];
            ((both[0] == both[1]) == pair.is_same).then_some(both)
        };
        Comparisons::new(scores, pairs.iter().map(|p| p.is_same).collect(), pairs.iter().map(both).collect())
    }

    fn row(&self, template: u32) -> Result<usize> {
        let missing = || Error::Evaluation(format!("template {template}: expected at least one image, found none"));
        self.row_of.get(&template).copied().ok_or_else(missing)
    }
}
