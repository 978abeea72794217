//! Images: their names, the store, and how they come from a registry.

pub(crate) mod archive;
pub(crate) mod builtin;
mod download;
pub(crate) mod layer;
pub(crate) mod platform;
pub(crate) mod pull;
pub(crate) mod push;
mod reasons;
pub(crate) mod store;
pub(crate) mod unpack;

use oci_client::Reference;

pub use platform::{Platform, architecture};

/// The full name with a tag: `app` becomes `docker.io/library/app:latest`.
#[must_use]
pub fn normalize(name: &str) -> Option<String> {
    let reference: Reference = name.parse().ok()?;
    let tag = reference.tag().unwrap_or("latest");
    Some(format!("{}/{}:{tag}", reference.registry(), reference.repository()))
}

/// The first letters of an id, which tell it from others well enough.
pub(crate) fn short(id: &str) -> &str {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    &hex[..hex.len().min(12)]
}

/// The name as users write it: without `docker.io/library/`.
#[must_use]
pub fn familiar(name: &str) -> &str {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    name.strip_prefix("library/").unwrap_or(name)
}

/// What the image is called in its registry: `library/app`, without registry, tag or digest.
#[must_use]
pub fn repository_path(name: &str) -> Option<String> {
    Some(name.parse::<Reference>().ok()?.repository().to_owned())
}

/// The full name without tag.
pub(crate) fn repository(name: &str) -> String {
    match name.parse::<Reference>() {
        Ok(reference) => format!("{}/{}", reference.registry(), reference.repository()),
        Err(_) => name.to_owned(),
    }
}

/// The full name with the digest that pins it.
pub(crate) fn pinned(name: &str) -> Option<String> {
    let (bare, digest) = name.split_once('@')?;
    Some(format!("{}@{digest}", repository(bare)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_and_shortened_as_docker_does() {
        assert_eq!(normalize("nginx").as_deref(), Some("docker.io/library/nginx:latest"));
        assert_eq!(normalize("a/b:1").as_deref(), Some("docker.io/a/b:1"));
        assert_eq!(normalize("localhost:5000/x:2").as_deref(), Some("localhost:5000/x:2"));
        assert_eq!(normalize("UPPER CASE"), None);
        assert_eq!(familiar("docker.io/library/nginx:1"), "nginx:1");
        assert_eq!(familiar("reg:5000/x:1"), "reg:5000/x:1");
    }
}
