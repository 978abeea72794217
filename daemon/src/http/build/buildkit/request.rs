//! What clients ask of the Dockerfile's frontend, read into the builder's options.

use std::collections::{BTreeMap, HashMap};

use skep_engine::{BuildOptions, NetworkMode};
use tonic::Status;

use crate::config::ulimit;
use crate::http::build::hosts;

/// What a build is asked for.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) options: BuildOptions,
    /// The name of the Dockerfile.
    pub(super) filename: String,
    /// What the client calls the directory that the Dockerfile is in; none: it is in the context.
    pub(super) dockerfile_dir: Option<String>,
    pub(super) context: Source,
    /// A directory in the context to build in.
    pub(super) subdir: String,
    pub(super) named: BTreeMap<String, Source>,
}

/// Where files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A directory of a client's, by the name it has there and the client's session, if that is not the build's own.
    Dir {
        name: String,
        session: Option<String>,
    },
    /// An archive that the client read.
    Upload(String),
    /// What the daemon fetches.
    Url(String),
    Image(String),
}

impl Default for Source {
    fn default() -> Self {
        Self::Dir { name: "context".into(), session: None }
    }
}

/// Reads the attributes of `dockerfile.v0`.
pub(super) fn read(attributes: &HashMap<String, String>) -> Result<Asked, Status> {
    let text = |name: &str| attributes.get(name).map(String::as_str).unwrap_or_default();
    let with = |prefix: &str| {
        let those = attributes.iter().filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value)));
        those.map(|(key, value)| (key.to_owned(), value.clone())).collect::<BTreeMap<_, _>>()
    };
    refuse(attributes)?;
    let context = Some(text("contextkey")).filter(|key| !key.is_empty()).unwrap_or("context");
    let dockerfile = Some(text("dockerfilekey")).filter(|key| !key.is_empty()).unwrap_or("dockerfile");
    let context = match text("context") {
        "" => dir(attributes, context),
        url => source(attributes, url)?,
    };
    let is_local = matches!(context, Source::Dir { .. });
    let named = with("context:").into_iter().map(|(name, value)| {
        let name = name.split("::").next().unwrap_or_default().to_owned();
        source(attributes, &value).map(|source| (name, source))
    });
    let options = BuildOptions {
        dockerfile: filename(text("filename")),
        build_args: with("build-arg:").into_iter().map(|(name, value)| (name, Some(value))).collect(),
        labels: with("label:"),
        target: text("target").to_owned(),
        no_cache: attributes.contains_key("no-cache"),
        pull: text("image-resolve-mode") == "pull",
        platform: platform(text("platform"))?,
        network: match text("force-network-mode") {
            "host" => NetworkMode::Host,
            "none" => NetworkMode::None,
            _ => NetworkMode::Bridge,
        },
        hosts: hosts(text("add-hosts")).map_err(|error| invalid(error.text()))?,
        shm_size_bytes: match text("shm-size") {
            "" => 0,
            size => size.parse().map_err(|_| invalid(format!("shm-size {size:?} is no number of bytes")))?,
        },
        cgroup_parent: text("cgroup-parent").to_owned(),
        ulimits: text("ulimit")
            .split(',')
            .filter(|limit| !limit.is_empty())
            .map(|limit| ulimit(limit).ok_or_else(|| invalid(format!("ulimit {limit:?}: write NAME=SOFT[:HARD]"))))
            .collect::<Result<_, _>>()?,
        at_once: true,
        ..BuildOptions::default()
    };
    Ok(Asked {
        filename: options.dockerfile.clone(),
        options,
        // Beside a context that the daemon fetches there is one only if the client says so.
        dockerfile_dir: (is_local || attributes.contains_key("dockerfilekey")).then(|| dockerfile.to_owned()),
        context,
        subdir: text("contextsubdir").to_owned(),
        named: named.collect::<Result<_, _>>()?,
    })
}

fn invalid(why: impl Into<String>) -> Status {
    Status::invalid_argument(why)
}

fn filename(text: &str) -> String {
    if text.is_empty() { "Dockerfile".into() } else { text.into() }
}

/// What asks for more than there is.
fn refuse(attributes: &HashMap<String, String>) -> Result<(), Status> {
    if let Some(request) = attributes.get("requestid") {
        return Err(Status::unimplemented(format!(
            "{request} is not supported by this builder: leave --check, --call and --print out"
        )));
    }
    if let Some(attestation) = attributes.keys().find(|key| key.starts_with("attest:")) {
        return Err(Status::unimplemented(format!("{attestation}: attestations are not kept: leave it out")));
    }
    Ok(())
}

fn platform(text: &str) -> Result<Option<skep_engine::Platform>, Status> {
    if text.contains(',') {
        return Err(invalid(format!("--platform {text}: one image is built for one platform: build them one by one")));
    }
    crate::http::images::platform(text).map_err(|error| invalid(error.text()))
}

fn dir(attributes: &HashMap<String, String>, name: &str) -> Source {
    let session = attributes.get(&format!("local-sessionid:{name}")).cloned();
    Source::Dir { name: name.to_owned(), session }
}

fn source(attributes: &HashMap<String, String>, text: &str) -> Result<Source, Status> {
    Ok(if let Some(id) = text.strip_prefix("http://buildkit-session") {
        Source::Upload(id.to_owned())
    } else if let Some(name) = text.strip_prefix("local:") {
        dir(attributes, name)
    } else if let Some(image) = text.strip_prefix("docker-image://") {
        Source::Image(image.to_owned())
    } else if let Some(kind) = ["input:", "oci-layout://", "target:"].iter().find(|kind| text.starts_with(**kind)) {
        return Err(Status::unimplemented(format!(
            "the context {text:?} cannot be used: this builder knows none of {kind}; use a directory, a URL or docker-image://"
        )));
    } else {
        Source::Url(text.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pairs: &[(&str, &str)]) -> Result<Asked, Status> {
        read(&pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    #[test]
    fn attributes_are_read() {
        let asked = asked(&[
            ("filename", "x.Dockerfile"),
            ("build-arg:A", "1"),
            ("label:l", "m"),
            ("no-cache", ""),
            ("add-hosts", "a=1.2.3.4,b=::1"),
            ("ulimit", "nofile=10:20"),
            ("context:base::linux/amd64", "docker-image://busybox"),
            ("context:lib", "local:lib"),
            ("local-sessionid:lib", "other"),
            ("force-network-mode", "none"),
            ("something:new", "of no meaning here"),
        ])
        .unwrap();
        assert_eq!((asked.filename.as_str(), asked.dockerfile_dir.as_deref()), ("x.Dockerfile", Some("dockerfile")));
        assert_eq!(asked.context, Source::Dir { name: "context".into(), session: None });
        assert_eq!(asked.options.build_args["A"].as_deref(), Some("1"));
        assert!(asked.options.no_cache && asked.options.network == NetworkMode::None);
        assert_eq!(asked.options.hosts, ["1.2.3.4\ta", "::1\tb"]);
        assert_eq!(asked.options.ulimits[0].hard, 20);
        assert_eq!(asked.named["base"], Source::Image("busybox".into()));
        assert_eq!(asked.named["lib"], Source::Dir { name: "lib".into(), session: Some("other".into()) });
    }

    #[test]
    fn a_context_from_elsewhere_brings_its_dockerfile() {
        let git = asked(&[("context", "https://host/a.git#v1")]).unwrap();
        assert_eq!((git.context, git.dockerfile_dir), (Source::Url("https://host/a.git#v1".into()), None));
        let archive = asked(&[("context", "http://buildkit-session/abc"), ("dockerfilekey", "dockerfile")]).unwrap();
        assert_eq!(archive.context, Source::Upload("/abc".into()));
        assert_eq!(archive.dockerfile_dir.as_deref(), Some("dockerfile"));
    }

    #[test]
    fn what_there_is_not_is_refused_by_name() {
        for (key, value, want) in [
            ("requestid", "frontend.lint", "frontend.lint"),
            ("attest:sbom", "", "attest:sbom"),
            ("platform", "linux/amd64,linux/arm64", "one platform"),
            ("context:a", "input:a", "input:"),
            ("shm-size", "big", "shm-size"),
            ("ulimit", "nofile", "nofile"),
        ] {
            let why = asked(&[(key, value)]).unwrap_err();
            assert!(why.message().contains(want), "{key}={value}: {why}");
        }
    }
}
