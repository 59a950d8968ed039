//! Mask colours: named families with a little random variation.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A family of mask colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskColour {
    /// Paper white.
    White,
    /// The light blue of medical masks.
    LightBlue,
    /// A saturated blue.
    Blue,
    /// A dark blue.
    Navy,
    /// The mint to green of medical masks and fabrics.
    Green,
    /// Black, as photographed: not quite zero.
    Black,
    /// Light to dark grey.
    Grey,
    /// Pink.
    Pink,
    /// Red to dark red.
    Red,
    /// Cream to yellow.
    Yellow,
    /// Lilac to purple.
    Purple,
    /// Beige to brown.
    Brown,
}

impl MaskColour {
    /// Every family, in the order of declaration.
    pub const ALL: [Self; 12] = [
        Self::White,
        Self::LightBlue,
        Self::Blue,
        Self::Navy,
        Self::Green,
        Self::Black,
        Self::Grey,
        Self::Pink,
        Self::Red,
        Self::Yellow,
        Self::Purple,
        Self::Brown,
    ];

    /// Rough share of masks of this colour, in percent, judged by eye in 143 photos from the web of people who wear one.
    pub(super) fn share(self) -> f32 {
        match self {
            Self::White => 33.0,
            Self::Black => 23.0,
            Self::LightBlue => 11.0,
            Self::Grey => 11.0,
            Self::Green => 5.0,
            Self::Yellow | Self::Pink => 4.0,
            Self::Navy | Self::Brown => 3.0,
            Self::Blue | Self::Red | Self::Purple => 1.0,
        }
    }

    /// Returns a random colour of this family: red, green, blue in `[0, 255]`.
    ///
    /// It lies between the family's two end colours, which are those of real masks in even light.
    pub fn sample(self, rng: &mut ChaCha8Rng) -> [f32; 3] {
        let (from, to): ([f32; 3], [f32; 3]) = match self {
            Self::White => ([222.0, 224.0, 226.0], [246.0, 246.0, 244.0]),
            Self::LightBlue => ([128.0, 178.0, 212.0], [176.0, 214.0, 234.0]),
            Self::Blue => ([32.0, 84.0, 168.0], [64.0, 132.0, 206.0]),
            Self::Navy => ([24.0, 30.0, 60.0], [38.0, 52.0, 96.0]),
            Self::Green => ([60.0, 140.0, 112.0], [150.0, 206.0, 182.0]),
            Self::Black => ([26.0, 26.0, 28.0], [46.0, 46.0, 50.0]),
            Self::Grey => ([78.0, 80.0, 84.0], [168.0, 168.0, 170.0]),
            Self::Pink => ([214.0, 130.0, 152.0], [240.0, 190.0, 198.0]),
            Self::Red => ([128.0, 24.0, 32.0], [196.0, 44.0, 46.0]),
            Self::Yellow => ([214.0, 180.0, 84.0], [238.0, 222.0, 168.0]),
            Self::Purple => ([92.0, 62.0, 134.0], [176.0, 152.0, 206.0]),
            Self::Brown => ([112.0, 82.0, 62.0], [206.0, 182.0, 156.0]),
        };
        let along = rng.random::<f32>();
        std::array::from_fn(|i| {
            (from[i] + (to[i] - from[i]) * along + rng.random_range(-6.0..6.0f32)).clamp(4.0, 250.0)
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn families_keep_apart() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..200 {
            let luminance = |c: [f32; 3]| c.iter().sum::<f32>() / 3.0;
            assert!(luminance(MaskColour::White.sample(&mut rng)) > 210.0);
            assert!(luminance(MaskColour::Black.sample(&mut rng)) < 60.0);
            let [red, _, blue] = MaskColour::LightBlue.sample(&mut rng);
            assert!(blue > red + 30.0);
            let [red, green, blue] = MaskColour::Red.sample(&mut rng);
            assert!(red > green + 70.0 && red > blue + 70.0);
        }
    }

    #[test]
    fn all_lists_every_family_by_its_config_name() {
        let names: Vec<_> = MaskColour::ALL.iter().map(|c| serde_json::to_string(c).unwrap()).collect();
        assert_eq!(names[1], "\"light_blue\"");
        let error = serde_json::from_str::<MaskColour>("\"mauve\"").unwrap_err().to_string();
        assert!(names.iter().all(|name| error.contains(name.trim_matches('"'))), "{error}");
    }
}
