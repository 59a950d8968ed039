//! From faces to open-set identification, on drawn people: a network learns to see masks, thresholds are calibrated, a
//! gallery is filled and searched, by people who are in it and by strangers, with masks and without.
//!
//! ```text
//! cargo run --release --features gallery --example identify
//! cargo run --release --features gallery --example identify -- my.gallery
//! ```
//!
//! Nothing is downloaded, and no person is real. With real photos the commands `calibrate`, `enrol` and `search` do the
//! same: docs/identification.md.

use std::path::{Path, PathBuf};

use anyhow::Result;
use maskinv::data::mask::MaskConfig;
use maskinv::data::{Dataset, ProceduralConfig, ProceduralFaces};
use maskinv::eval::{EmbedConfig, EvalConfig, MaskedFaces, Scores, Setting, compare_all_pairs, embed_with_masks};
use maskinv::gallery::{ColumnKind, Finder, Gallery, GalleryModel, NewFace, Pool};
use maskinv::models::open_model;
use maskinv::train::{MaskHeadConfig, fit_mask_head};
use maskinv::weights::Hub;

/// People in the gallery; as many again are strangers.
const PEOPLE: usize = 100;
/// Images of each: the first is enrolled, the others are probes.
const IMAGES: usize = 3;
/// Share of strangers who may be taken for somebody in the gallery.
const FPIR: f64 = 0.05;

fn drawn(first_identity: u64, num_identities: usize, images_per_identity: usize) -> Result<ProceduralFaces> {
    let config =
        ProceduralConfig { first_identity, num_identities, images_per_identity, ..ProceduralConfig::default() };
    Ok(ProceduralFaces::new(config)?)
}

fn main() -> Result<()> {
    let path = std::env::args().nth(1).map(PathBuf::from);
    let temporary = tempfile::tempdir()?;
    let path = path.unwrap_or_else(|| temporary.path().join("people.gallery"));

    // The network that is part of the program, and what says whether a mask is worn: fitted on other drawn people.
    let model = open_model("procedural-teacher", None, &Hub::default(), &mut |_, _| ())?.model;
    let others = drawn(5_000, 100, 4)?;
    let head =
        fit_mask_head(&model, &others, &MaskConfig::default(), &MaskHeadConfig::default(), "drawn people", |_, _| ())?;
    let model = model.with_mask_head(Some(head));

    // One threshold for two faces without a mask, one for a face without and one with: at the false match rate that
    // makes one of twenty strangers match one of all people.
    let fmr = 1.0 - (1.0 - FPIR).powf(1.0 / PEOPLE as f64);
    let config = EvalConfig::default();
    let compared = compare_all_pairs(&model, &others, None, &config, |_, _| ())?;
    let threshold = |setting: Setting| -> Result<f64> {
        let (_, pairs) = &compared[&setting];
        Ok(Scores::from_labelled(pairs.scores(), pairs.is_same())?.threshold_at_fmr(fmr)?)
    };
    let (unmasked, masked) = (threshold(Setting::UU)?, threshold(Setting::UM)?);
    println!("FPIR {FPIR} among {PEOPLE} people is FMR {fmr:.1e}: {unmasked:.3} without masks, {masked:.3} with one");

    // The first image of each person goes into the gallery.
    let known = drawn(7_000, PEOPLE, IMAGES)?;
    let gallery_model = GalleryModel {
        name: "procedural-teacher".to_owned(),
        embedding_size: model.config().embedding_size,
        computed_with: model.computed_with()?,
    };
    let mut gallery = Gallery::open_or_create(&path, &gallery_model)?;
    let face = |set: &ProceduralFaces, i: usize| Ok(set.get(i)?.image);
    let embedded = EmbedConfig::default();
    let (enrolled, masks) = embed_with_masks(&model, PEOPLE, |k| face(&known, k * IMAGES), embedded, |_| ())?;
    let new = |k: usize| NewFace {
        person: known.identity_name(k as u32),
        embedding: enrolled[k].to_vec(),
        image: number(k),
        source: known.name(k * IMAGES),
        enrolled: 0,
        score: None,
        side: None,
        sharpness: 0.0,
        mask: masks.as_ref().map(|masks| masks[k]),
    };
    gallery.enrol(&(0..PEOPLE).map(new).collect::<Vec<_>>())?;
    let finder = Finder::new(&gallery, ColumnKind::default(), Pool::Best)?;
    println!("{}: {} people", name(&path), gallery.info()?.num_people);

    // Their other images, and strangers, without a mask and with one.
    let strangers = drawn(8_000, PEOPLE, IMAGES)?;
    for is_masked in [false, true] {
        let mut rates = Vec::new();
        for (set, probes) in [(&known, probes(1)), (&strangers, probes(0))] {
            let drawn_masks = MaskedFaces::new(set, &config)?;
            let probe = |k: usize| if is_masked { drawn_masks.get(probes[k]) } else { face(set, probes[k]) };
            let (queries, masks) = embed_with_masks(&model, probes.len(), probe, embedded, |_| ())?;
            let masks = masks.unwrap_or_default();
            let found = finder.search(queries.values(), 1)?;
            let is_right = |k: usize, person: &str| set.identity_name(set.label(probes[k])) == person;
            // By one threshold, and by the one that fits what the head sees.
            let matches = |k: usize, fits: bool| {
                let at = if fits && masks[k] >= 0.5 { masked } else { unmasked };
                found[k].first().filter(|candidate| candidate.score >= at)
            };
            let is_known = std::ptr::eq(set, &known);
            let share = |fits: bool| {
                let hit = |&k: &usize| matches(k, fits).is_some_and(|c| !is_known || is_right(k, &c.person));
                100.0 * (0..probes.len()).filter(hit).count() as f64 / probes.len() as f64
            };
            rates.push([share(false), share(true)]);
        }
        let who = if is_masked { "with masks" } else { "without masks" };
        for (i, thresholds) in ["one threshold", "the threshold that fits"].into_iter().enumerate() {
            let [found, mistaken] = [rates[0][i], rates[1][i]];
            println!(
                "probes {who}, {thresholds}: {found:.1} % found, {mistaken:.1} % of strangers mistaken for somebody"
            );
        }
    }
    Ok(())
}

/// Indices of the images of every person from number `first` on.
fn probes(first: usize) -> Vec<usize> {
    (0..PEOPLE * IMAGES).filter(|i| i % IMAGES >= first).collect()
}

/// Stands for the SHA-256 of a photo.
fn number(k: usize) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(k as u64).to_le_bytes());
    bytes
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
