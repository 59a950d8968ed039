//! `maskinv data contact-sheet`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use image::{RgbImage, imageops};
use rand::SeedableRng;
use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

use super::open;
use crate::cli::model::HubArgs;
use crate::cli::print;
use crate::data::{Dataset, FACE_SIZE, output_format, write_image};
use crate::files::check_writable;

/// Arguments of `maskinv data contact-sheet`.
#[derive(Args, Debug)]
pub(super) struct SheetArgs {
    /// Folder of people, .rec, .tar or .parquet file, or list of images
    #[arg(value_name = "DATA")]
    data: PathBuf,
    /// New picture, such as sheet.png, with one row per person
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Maximum number of people
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100))]
    rows: u32,
    /// Maximum number of images per person
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    columns: u32,
    /// Random seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl SheetArgs {
    pub(super) fn run(self, hub: &HubArgs) -> Result<()> {
        let out = self.output.display();
        if self.output.exists() {
            bail!("{out}: exists already");
        }
        output_format(&self.output)?;
        check_writable(&self.output)?;
        let source = open(&self.data, hub)?;
        let images = source.images.as_ref();
        let people = self.choose(images);
        let columns = people.iter().map(Vec::len).max().unwrap_or(1) as u32;
        let mut sheet = RgbImage::new(FACE_SIZE * columns, FACE_SIZE * people.len() as u32);
        for (row, person) in (0..).zip(&people) {
            for (column, &index) in (0..).zip(person) {
                let sample = images.get(index)?;
                imageops::replace(&mut sheet, &sample.image, column * i64::from(FACE_SIZE), row * i64::from(FACE_SIZE));
            }
            let name = images.identity_name(images.label(person[0]));
            print(&format!("row {}: {name}, {} images", row + 1, person.len()))?;
        }
        write_image(&sheet, &self.output).map_err(Into::into)
    }

    /// Draws the images of each row; people with more than one image come first.
    fn choose(&self, images: &dyn Dataset) -> Vec<Vec<usize>> {
        let mut of_people: Vec<Vec<usize>> = vec![Vec::new(); images.num_identities()];
        (0..images.len()).for_each(|i| of_people[images.label(i) as usize].push(i));
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        of_people.shuffle(&mut rng);
        of_people.sort_by_key(|person| person.len() < 2);
        of_people.truncate(self.rows as usize);
        let mut chosen = |person: Vec<usize>| {
            let num = person.len().min(self.columns as usize);
            let mut places = index::sample(&mut rng, person.len(), num).into_vec();
            places.sort_unstable();
            places.into_iter().map(|place| person[place]).collect()
        };
        of_people.into_iter().map(&mut chosen).collect()
    }
}
