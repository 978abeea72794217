//! Building images: the context comes as an archive, the progress goes as lines.

pub(crate) mod buildkit;
mod remote;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use axum::Json;
use axum::extract::{Query, Request};
use axum::http::{HeaderMap, Uri};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::{SecretBytes, with_causes};
use skep_engine::{
    BuildClient, BuildError, BuildOptions, BuildOutput, Credentials, Engine, Lender, Lending, NetworkMode,
    ResourceLimits,
};
use tokio::sync::mpsc;

use super::json::or_null;
use super::networks::joining::joinable;
use super::stream::{json_error, json_lines, read_body};
use super::swarm::is_on;
use super::{ApiError, State};

const LINES_AHEAD: usize = 256;

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct BuildQuery {
    dockerfile: String,
    remote: String,
    q: String,
    nocache: String,
    pull: String,
    buildargs: String,
    labels: String,
    target: String,
    networkmode: String,
    platform: String,
    cachefrom: String,
    memory: i64,
    memswap: i64,
    cpushares: u64,
    cpusetcpus: String,
    cpusetmems: String,
    cgroupparent: String,
    ulimits: String,
    isolation: String,
    securityopt: String,
    cpuperiod: u64,
    cpuquota: i64,
    shmsize: i64,
    version: String,
    session: String,
    squash: String,
    outputs: String,
}

impl BuildQuery {
    fn options(&self, headers: &HeaderMap) -> Result<BuildOptions, ApiError> {
        let isolation = !matches!(self.isolation.as_str(), "" | "default");
        // An empty list, as clients write it.
        let security = !matches!(self.securityopt.as_str(), "" | "null" | "[]");
        for (what, asks) in [
            ("squash", is_on(&self.squash)),
            ("outputs", !self.outputs.is_empty()),
            ("isolation", isolation),
            ("security-opt", security),
        ] {
            if asks {
                return Err(ApiError::unsupported(format!("{what} is not supported yet for builds")));
            }
        }
        Ok(BuildOptions {
            dockerfile: self.dockerfile.clone(),
            tags: Vec::new(),
            cache_from: map("cachefrom", &self.cachefrom)?,
            build_args: map("buildargs", &self.buildargs)?,
            labels: map("labels", &self.labels)?,
            target: self.target.clone(),
            no_cache: is_on(&self.nocache),
            pull: is_on(&self.pull),
            platform: super::images::platform(&self.platform)?,
            network: NetworkMode::Bridge,
            hosts: Vec::new(),
            limits: ResourceLimits {
                memory_bytes: self.memory,
                memory_swap_bytes: self.memswap,
                cpu_shares: self.cpushares,
                cpuset_cpus: self.cpusetcpus.clone(),
                cpuset_mems: self.cpusetmems.clone(),
                cpu_period_micros: self.cpuperiod,
                cpu_quota_micros: self.cpuquota,
                ..ResourceLimits::default()
            },
            shm_size_bytes: self.shmsize,
            cgroup_parent: self.cgroupparent.clone(),
            ulimits: map("ulimits", &self.ulimits)?,
            client: BuildClient::new(Given { secrets: secrets(headers)?, credentials: registry_config(headers)? }),
            ..BuildOptions::default()
        })
    }
}

fn map<T: serde::de::DeserializeOwned + Default>(name: &str, text: &str) -> Result<T, ApiError> {
    if text.is_empty() {
        return Ok(T::default());
    }
    let read = serde_json::from_str::<Option<T>>(text).map(Option::unwrap_or_default);
    read.map_err(|error| ApiError::bad_request(format!("{name} cannot be read: {error}")))
}

/// Reads a query; of what is there twice, the first.
fn read_query<T: serde::de::DeserializeOwned>(uri: &Uri) -> Result<T, ApiError> {
    let mut seen = BTreeSet::new();
    let pairs = uri.query().unwrap_or_default().split('&');
    let first: Vec<_> = pairs.filter(|pair| seen.insert(pair.split('=').next())).collect();
    let uri: Uri = format!("/?{}", first.join("&")).parse().map_err(ApiError::bad_request)?;
    Query::try_from_uri(&uri).map(|Query(query)| query).map_err(ApiError::bad_request)
}

/// What may be there several times: tags, and lines of /etc/hosts.
fn lists(uri: &Uri) -> Result<(Vec<String>, Vec<String>), ApiError> {
    let pairs: Vec<(String, String)> =
        Query::try_from_uri(uri).map(|Query(pairs)| pairs).map_err(ApiError::bad_request)?;
    let all = |name: &str| {
        let named = pairs.iter().filter(|(key, value)| key == name && !value.is_empty());
        named.map(|(_, value)| value.clone()).collect::<Vec<_>>()
    };
    let lines = all("extrahosts").iter().map(|text| hosts(text)).collect::<Result<Vec<_>, _>>()?;
    Ok((all("t"), lines.concat()))
}

/// The network that commands of a build are in.
async fn network(state: &State, mode: &str) -> Result<NetworkMode, ApiError> {
    match mode {
        "" | "default" | "bridge" => Ok(NetworkMode::Bridge),
        "host" => Ok(NetworkMode::Host),
        "none" => Ok(NetworkMode::None),
        named => match named.strip_prefix("container:") {
            Some(name) => Ok(NetworkMode::Container(state.engine.inspect(name)?.id)),
            None => Ok(NetworkMode::Local(vec![joinable(state, named).await?.any_place()])),
        },
    }
}

/// `["name:ip"]`, or the same in one string.
fn hosts(text: &str) -> Result<Vec<String>, ApiError> {
    let list: Vec<String> = if text.starts_with('[') {
        map("extrahosts", text)?
    } else {
        text.split(',').filter(|host| !host.is_empty()).map(str::to_owned).collect()
    };
    let line = |host: &String| {
        let (name, ip) = host
            .split_once([':', '='])
            .ok_or_else(|| ApiError::bad_request(format!("extra host {host:?} cannot be read: write NAME:IP")))?;
        Ok(format!("{ip}\t{name}"))
    };
    list.iter().map(line).collect()
}

/// `X-Registry-Config`: what to log in with, by registry.
fn registry_config(headers: &HeaderMap) -> Result<BTreeMap<String, Credentials>, ApiError> {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Entry {
        username: Option<String>,
        password: Option<String>,
    }
    let Some(header) = headers.get("x-registry-config") else { return Ok(BTreeMap::new()) };
    let wrong =
        || ApiError::bad_request("X-Registry-Config cannot be read: it is JSON by registry, in base 64 for URLs");
    let bytes = skep_engine::decode_header(header.as_bytes()).map_err(|_| wrong())?;
    let entries: Option<BTreeMap<String, Entry>> = serde_json::from_slice(&bytes).map_err(|_| wrong())?;
    let entry = |(registry, entry): (String, Entry)| {
        let username = entry.username.filter(|name| !name.is_empty())?;
        let password = SecretBytes::new(entry.password.unwrap_or_default().into_bytes());
        Some((registry, Credentials::Basic { username, password }))
    };
    Ok(entries.unwrap_or_default().into_iter().filter_map(entry).collect())
}

/// `X-Skep-Build-Secrets`: what `RUN --mount=type=secret` shows, each in base 64, by id; itself as the header above.
fn secrets(headers: &HeaderMap) -> Result<BTreeMap<String, SecretBytes>, ApiError> {
    let Some(header) = headers.get("x-skep-build-secrets") else { return Ok(BTreeMap::new()) };
    let wrong = || ApiError::bad_request("X-Skep-Build-Secrets cannot be read: it is JSON by id, in base 64 for URLs");
    let bytes = skep_engine::decode_header(header.as_bytes()).map_err(|_| wrong())?;
    let secrets: BTreeMap<String, String> = serde_json::from_slice(&bytes).map_err(|_| wrong())?;
    let secret = |(id, text): (String, String)| {
        let bytes = BASE64_STANDARD.decode(text).map_err(|_| wrong())?;
        Ok((id, SecretBytes::new(bytes)))
    };
    secrets.into_iter().map(secret).collect()
}

/// What came with the request.
struct Given {
    secrets: BTreeMap<String, SecretBytes>,
    /// By registry.
    credentials: BTreeMap<String, Credentials>,
}

impl Lender for Given {
    fn secret<'a>(&'a self, id: &'a str) -> Lending<'a, Result<Option<SecretBytes>, String>> {
        Box::pin(async { Ok(self.secrets.get(id).cloned()) })
    }

    fn credentials<'a>(&'a self, registry: &'a str) -> Lending<'a, Credentials> {
        // Under this name clients keep what they log in with there.
        let name = if registry == "docker.io" { "https://index.docker.io/v1/" } else { registry };
        Box::pin(async move { self.credentials.get(name).cloned().unwrap_or_default() })
    }
}

/// A build's context on disk, gone with the build.
struct Context(PathBuf);

impl Context {
    fn new(engine: &Engine) -> Result<Self, ApiError> {
        let dir = engine.data_dir().join(format!("tmp/build-{:016x}", rand::random::<u64>()));
        std::fs::create_dir_all(&dir).map_err(|error| ApiError::internal(format!("{}: {error}", dir.display())))?;
        Ok(Self(dir))
    }

    /// Unpacks the archive that a request brings.
    async fn of_body(engine: &Engine, request: Request) -> Result<Self, ApiError> {
        let context = Self::new(engine)?;
        let into = context.0.clone();
        let unpacked = read_body(request.into_body(), move |archive| skep_engine::unpack_context(archive, &into)).await;
        unpacked.map_err(ApiError::internal)?.map_err(|error| {
            ApiError::bad_request(format!("the build's context cannot be read: {}", with_causes(&error)))
        })?;
        Ok(context)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, "a build's context was not removed");
        }
    }
}

pub(super) async fn build(state: State, request: Request) -> Result<Response, ApiError> {
    let query: BuildQuery = read_query(request.uri())?;
    if query.version == "2" {
        return buildkit::build(&state, request, &query).await;
    }
    let mut options = query.options(request.headers())?;
    options.network = network(&state, &query.networkmode).await?;
    (options.tags, options.hosts) = lists(request.uri())?;
    if let Some(wrong) = options.tags.iter().find(|tag| skep_engine::normalize(tag).is_none()) {
        return Err(ApiError::bad_request(format!("invalid reference format: {wrong:?}")));
    }
    let (context, root) = if query.remote.is_empty() {
        let context = Context::of_body(&state.engine, request).await?;
        let root = context.path().to_owned();
        (context, root)
    } else {
        let context = Context::new(&state.engine)?;
        let fetched = remote::fetch(&query.remote, context.path()).await.map_err(ApiError::bad_request)?;
        if fetched.is_dockerfile {
            options.dockerfile = "Dockerfile".into();
        }
        (context, fetched.root)
    };
    skep_engine::check_dockerfile(&root, &options.dockerfile).map_err(ApiError::bad_request)?;
    let quiet = is_on(&query.q);
    let (lines, stream) = mpsc::channel(LINES_AHEAD);
    let engine = state.engine.clone();
    tokio::spawn(async move {
        let (output, mut told) = mpsc::channel(LINES_AHEAD);
        let relay = async {
            while let Some(output) = told.recv().await {
                let value = match output {
                    BuildOutput::Image(id) => json!({"aux": {"ID": id}}),
                    other => match other.text().filter(|_| !quiet) {
                        Some(text) => json!({"stream": text}),
                        None => continue,
                    },
                };
                if lines.send(value).await.is_err() {
                    // The client is gone: the build is given up at its next word.
                    told.close();
                }
            }
        };
        let built = async {
            let built = engine.build(&root, &options, &output).await;
            drop(output);
            built
        };
        let (built, ()) = tokio::join!(built, relay);
        match built {
            Ok(image) if quiet => drop(lines.send(json!({"stream": format!("{}\n", image.id)})).await),
            Ok(_) => {}
            Err(error) => drop(lines.send(failure(&error)).await),
        }
        drop(context);
    });
    Ok(json_lines(stream))
}

fn failure(error: &BuildError) -> Value {
    let text = with_causes(error);
    match error {
        BuildError::Command { code, .. } => json!({"error": text, "errorDetail": {"code": code, "message": text}}),
        BuildError::Dockerfile(_) | BuildError::Step { .. } | BuildError::Engine(_) | BuildError::GivenUp => {
            json_error(&text)
        }
    }
}

/// Removes what builds left that no image has.
pub(super) async fn prune(state: State) -> Result<Json<Value>, ApiError> {
    let mut before = state.engine.build_caches();
    before.extend(state.build_kit.usage());
    let bytes = state.build_kit.prune(&state.engine)?;
    let left: BTreeSet<_> = state.engine.build_caches().into_iter().chain(state.build_kit.usage()).collect();
    before.retain(|cache| !left.contains(cache));
    let gone: Vec<String> = before.into_iter().map(|(id, _)| id).collect();
    Ok(Json(json!({"CachesDeleted": or_null(gone), "SpaceReclaimed": bytes})))
}
