//! What images are made for: an operating system, an architecture and its variant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A platform in the words of the OCI image-spec. The variant may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

const SYSTEMS: [&str; 7] = ["linux", "windows", "darwin", "freebsd", "openbsd", "netbsd", "solaris"];
const ARCHITECTURES: [&str; 12] =
    ["amd64", "arm64", "arm", "386", "ppc64", "ppc64le", "s390x", "riscv64", "mips64", "mips64le", "loong64", "wasm"];

/// What is not understood as a platform.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownPlatform {
    #[error("{0:?}: unknown operating system or architecture: invalid argument; write it as {own}", own = Platform::own())]
    Word(String),
    #[error("{0:?} is an invalid component of {1:?}: letters, digits and _.- are meant, as in {own}", own = Platform::own())]
    Component(String, String),
}

/// This host's architecture in the words of image manifests.
#[must_use]
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

impl Platform {
    /// This host's.
    #[must_use]
    pub fn own() -> Self {
        Self { os: "linux".into(), architecture: architecture().into(), variant: String::new() }
    }

    /// An architecture by any of its names, and the variant that some of them mean.
    fn of_architecture(name: &str, variant: &str) -> Option<(String, String)> {
        let (name, meant) = match name.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" | "amd64" => ("amd64", if variant == "v1" { "" } else { variant }),
            "aarch64" | "arm64" => ("arm64", if matches!(variant, "8" | "v8") { "" } else { variant }),
            "i386" | "386" => ("386", variant),
            "armhf" => ("arm", "v7"),
            "armel" => ("arm", "v6"),
            "arm" => ("arm", if variant.is_empty() { "v7" } else { variant }),
            other => (*ARCHITECTURES.iter().find(|known| **known == other)?, variant),
        };
        let is_number = meant.bytes().all(|byte| byte.is_ascii_digit()) && !meant.is_empty();
        Some((name.into(), if is_number { format!("v{meant}") } else { meant.to_owned() }))
    }

    /// With one word for what has several.
    #[must_use]
    pub fn normal(&self) -> Self {
        let (architecture, variant) = Self::of_architecture(&self.architecture, &self.variant)
            .unwrap_or_else(|| (self.architecture.clone(), self.variant.clone()));
        Self { os: self.os.to_ascii_lowercase(), architecture, variant }
    }

    /// How well what is `offered` serves who wants this: 0 is best, none not at all. Processors run what was made
    /// for older variants of theirs, and most of those with 64 bits what was made for 32. What does not say what it
    /// is for may be for anything.
    #[must_use]
    pub fn rank(&self, offered: &Self) -> Option<u32> {
        let (wanted, offered) = (self.normal(), offered.normal());
        let version = |variant: &str, least: u32| {
            let digits = variant.trim_start_matches('v').split('.').next().unwrap_or_default();
            if variant.is_empty() { Some(least) } else { digits.parse::<u32>().ok() }
        };
        if offered.os.is_empty() || offered.architecture.is_empty() {
            return Some(1000);
        }
        if wanted.os != offered.os {
            return None;
        }
        let (name, other) = (wanted.architecture.as_str(), offered.architecture.as_str());
        match (name, other) {
            ("amd64", "386") => Some(100),
            ("arm64", "arm") => version(&offered.variant, 7).filter(|&is| is <= 8).map(|is| 100 + 8 - is),
            _ if name != other => None,
            ("amd64" | "arm64" | "arm", _) => {
                let least = if name == "arm64" { 8 } else { 1 };
                version(&wanted.variant, least)?.checked_sub(version(&offered.variant, least)?)
            }
            _ => (wanted.variant.is_empty() || wanted.variant == offered.variant).then_some(0),
        }
    }

    /// Whether what is `offered` serves who wants this.
    #[must_use]
    pub fn takes(&self, offered: &Self) -> bool {
        self.rank(offered).is_some()
    }
}

impl FromStr for Platform {
    type Err = UnknownPlatform;

    /// `OS[/ARCHITECTURE[/VARIANT]]`, or `ARCHITECTURE` alone; what is left out is as on this host.
    fn from_str(text: &str) -> Result<Self, UnknownPlatform> {
        let unknown = || UnknownPlatform::Word(text.to_owned());
        let parts: Vec<&str> = text.split('/').collect();
        let is_plain = |part: &&str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
        };
        if let Some(part) = parts.iter().find(|part| !is_plain(part)) {
            return Err(UnknownPlatform::Component((*part).to_owned(), text.to_owned()));
        }
        let system = |name: &str| {
            let name = if name.eq_ignore_ascii_case("macos") { "darwin".into() } else { name.to_ascii_lowercase() };
            SYSTEMS.contains(&name.as_str()).then_some(name)
        };
        let (os, name, variant) = match parts.as_slice() {
            [one] => match system(one) {
                Some(os) => (os, architecture(), ""),
                None => ("linux".into(), *one, ""),
            },
            // What is written in full may be anything: there may be images for it.
            [os, name] => (system(os).unwrap_or_else(|| os.to_ascii_lowercase()), *name, ""),
            [os, name, variant] => (system(os).unwrap_or_else(|| os.to_ascii_lowercase()), *name, *variant),
            _ => return Err(unknown()),
        };
        let known = Self::of_architecture(name, variant);
        let other = (parts.len() > 1).then(|| (name.to_ascii_lowercase(), variant.to_owned()));
        let (architecture, variant) = known.or(other).ok_or_else(unknown)?;
        Ok(Self { os, architecture, variant })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.variant.is_empty() { "" } else { "/" };
        write!(out, "{}/{}{slash}{}", self.os, self.architecture, self.variant)
    }
}

/// The one of several that serves best who wants `wanted`.
pub(crate) fn best<'a, T>(
    wanted: &Platform,
    offered: impl IntoIterator<Item = &'a T>,
    platform_of: impl Fn(&T) -> Option<Platform>,
) -> Option<&'a T> {
    let ranked = offered.into_iter().filter_map(|one| Some((wanted.rank(&platform_of(one)?)?, one)));
    ranked.min_by_key(|(rank, _)| *rank).map(|(_, one)| one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn platforms_are_read_by_all_their_names() {
        for (text, full) in [
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("arm64", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("armel", "linux/arm/v6"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/arm/6", "linux/arm/v6"),
            ("windows/amd64", "windows/amd64"),
            ("plan9/sparc64", "plan9/sparc64"),
        ] {
            assert_eq!(platform(text).to_string(), full);
        }
        assert_eq!(platform("linux"), Platform::own());
        for wrong in ["", "plan9", "sparc64", "linux/amd64/v1/x", "linux/amd64/", "/", "linux/a b"] {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn of_several_variants_the_newest_that_runs_is_taken() {
        let offered = ["linux/arm/v5", "linux/arm/v6", "linux/386", "linux/amd64", "linux/arm64"].map(platform);
        let chosen = |wanted: &str| best(&platform(wanted), &offered, |one| Some(one.clone())).map(Platform::to_string);
        assert_eq!(chosen("linux/arm/v7").as_deref(), Some("linux/arm/v6"));
        assert_eq!(chosen("linux/arm/v5").as_deref(), Some("linux/arm/v5"));
        assert_eq!(chosen("linux/amd64/v3").as_deref(), Some("linux/amd64"));
        assert_eq!(chosen("linux/arm64").as_deref(), Some("linux/arm64"));
        assert_eq!(chosen("linux/s390x"), None);
        assert_eq!(chosen("windows/amd64"), None);
        assert!(platform("amd64").takes(&platform("386")) && platform("arm64").takes(&platform("arm")));
        assert!(!platform("amd64").takes(&platform("linux/amd64/v3")), "it may use what is not there");
        assert!(platform("amd64").takes(&Platform::default()));
    }
}
