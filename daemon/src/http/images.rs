//! Images of this host, and what registries say of names.

mod pull;

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, Request};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::{SecretBytes, Timestamp, with_causes};
use skep_engine::{Credentials, EngineError, Image, Platform, PullProgress, Pushed, familiar};
use tokio::sync::mpsc;

use super::json::{or_null, parse};
use super::stream::{json_error, json_lines, read_body, written};
use super::{ApiError, ForceQuery, State};
use crate::filters::Filters;

const PROGRESS_AHEAD: usize = 256;
/// How long a registry may take to say whether it takes a password.
const LOGIN_LIMIT: Duration = Duration::from_secs(30);

fn tags(image: &Image) -> Vec<&str> {
    image.tags.iter().map(|tag| familiar(tag)).collect()
}

fn digests(image: &Image) -> Vec<&str> {
    image.digests.iter().map(|digest| familiar(digest)).collect()
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct ListQuery {
    filters: Option<String>,
    /// Of older clients.
    filter: Option<String>,
}

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    let known = ["dangling", "label", "reference", "before", "since", "until"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let dangling = filters.flag("dangling").map_err(ApiError::bad_request)?;
    let until = filters.until().map_err(ApiError::bad_request)?;
    let created_of = |filter: &str| -> Result<_, ApiError> {
        let named = filters.values(filter).next().map(|name| state.engine.image(name)).transpose()?;
        Ok(named.map(|image| image.created))
    };
    let (before, since) = (created_of("before")?, created_of("since")?);
    let has_name = filters.is_set("reference");
    let is_named = |name: &&str| filters.any("reference", |pattern| matches_reference(name, pattern));
    let wanted = |image: &&Image| {
        let named = |pattern: &str| {
            image.tags.iter().chain(&image.digests).any(|tag| matches_reference(familiar(tag), pattern))
        };
        dangling.is_none_or(|dangling| image.tags.is_empty() == dangling)
            && filters.labels("label", &image.config.labels)
            && (!has_name || tags(image).iter().chain(&digests(image)).any(is_named))
            && query.filter.as_deref().is_none_or(|pattern| pattern.is_empty() || named(pattern))
            && before.is_none_or(|at| image.created < at)
            && since.is_none_or(|at| image.created > at)
            && until.is_none_or(|at| image.created < at)
    };
    let value = |image: &Image| {
        json!({
            // Of several names, those that are asked for.
            "Id": image.id, "ParentId": "", "RepoTags": tags(image).into_iter().filter(is_named).collect::<Vec<_>>(),
            "RepoDigests": digests(image).into_iter().filter(is_named).collect::<Vec<_>>(),
            "Created": image.created.as_nanos() / 1_000_000_000, "Size": image.size_bytes, "SharedSize": -1,
            "VirtualSize": image.size_bytes, "Labels": image.config.labels,
            "Containers": state.engine.image_users(&image.id).len(),
        })
    };
    let mut images = state.engine.images();
    images.sort_by_key(|image| std::cmp::Reverse(image.created));
    Ok(Json(images.iter().filter(wanted).map(value).collect()))
}

/// Whether a name is meant by `repo`, `repo:tag`, or a pattern with `*`.
fn matches_reference(name: &str, pattern: &str) -> bool {
    let (repository, _) = name.split_once('@').or_else(|| name.rsplit_once(':')).unwrap_or((name, ""));
    let wanted = |text: &str| wildcard(pattern.as_bytes(), text.as_bytes());
    wanted(name) || wanted(repository)
}

/// `*` is any run of characters but slashes, `?` any one.
fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            wildcard(rest, text) || text.split_first().is_some_and(|(&c, after)| c != b'/' && wildcard(pattern, after))
        }
        (Some((&p, rest)), Some((&c, after))) => (p == c || (p == b'?' && c != b'/')) && wildcard(rest, after),
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// `/images/NAME/json` and so on: names have slashes, so the path is taken apart here.
pub(super) async fn get(
    state: State,
    Path(rest): Path<String>,
    Query(query): Query<ImageQuery>,
) -> Result<Response, ApiError> {
    let Some((name, what)) = rest.rsplit_once('/') else {
        return match rest.as_str() {
            "search" => {
                Err(ApiError::unsupported("searching needs Docker Hub, which this daemon does not ask: name an image"))
            }
            "get" => save(&state, &query.all_names(), query.platform()?.as_ref()),
            other => Err(ApiError::not_found(format!("page not found: /images/{other}"))),
        };
    };
    let platform = query.platform()?;
    match what {
        "json" => Ok(Json(inspect(&state, &state.engine.image_for(name, platform.as_ref())?)).into_response()),
        "history" => {
            state.engine.image_for(name, platform.as_ref())?;
            Ok(Json(history(&state, name)?).into_response())
        }
        "get" => save(&state, &[name.to_owned()], platform.as_ref()),
        "attestations" => Err(ApiError::unsupported("attestations are not supported: images are kept without them")),
        other => Err(ApiError::not_found(format!("page not found: /images/{name}/{other}"))),
    }
}

fn inspect(state: &State, image: &Image) -> Value {
    let mut config = json!(image.config);
    for (key, missing) in [("Cmd", Value::Null), ("Entrypoint", Value::Null), ("Labels", Value::Null)] {
        if config[key].as_array().is_some_and(Vec::is_empty)
            || config[key].as_object().is_some_and(serde_json::Map::is_empty)
        {
            config[key] = missing;
        }
    }
    if config.get("OnBuild").is_none() {
        config["OnBuild"] = Value::Null;
    }
    let (author, comment) = state.engine.image_notes(image);
    json!({
        "Id": image.id, "RepoTags": tags(image), "RepoDigests": digests(image), "Parent": state.engine.image_below(image).unwrap_or_default(), "Comment": comment,
        "Created": image.created, "Author": author, "Architecture": image.architecture, "Os": image.os, "Variant": image.variant,
        "Size": image.size_bytes, "VirtualSize": image.size_bytes, "DockerVersion": "",
        "Config": config, "RootFS": {"Type": "layers", "Layers": image.layers},
        "GraphDriver": {"Name": state.engine.storage_driver().as_str(), "Data": {}}, "Metadata": {"LastTagTime": Timestamp::NEVER},
    })
}

fn history(state: &State, name: &str) -> Result<Value, ApiError> {
    let lines = state.engine.history(name)?;
    let value = |line: &skep_engine::HistoryLine| {
        json!({
            "Id": line.id.as_deref().unwrap_or("<missing>"), "Created": line.created.as_nanos() / 1_000_000_000,
            "CreatedBy": line.created_by, "Tags": if line.tags.is_empty() { Value::Null } else { json!(line.tags) },
            "Size": line.size_bytes, "Comment": line.comment,
        })
    };
    Ok(Value::Array(lines.iter().map(value).collect()))
}

/// What is asked of images that are here.
#[derive(Deserialize, Default)]
pub(super) struct ImageQuery {
    #[serde(default)]
    names: String,
    platform: Option<String>,
}

impl ImageQuery {
    fn platform(&self) -> Result<Option<Platform>, ApiError> {
        platform_described(self.platform.as_ref())
    }

    fn all_names(&self) -> Vec<String> {
        self.names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }
}

/// `/images/get?names=a&names=b`: a parameter that may come again, and a platform.
pub(super) async fn save_several(state: State, request: Request) -> Result<Response, ApiError> {
    let pairs: Vec<(String, String)> =
        Query::try_from_uri(request.uri()).map(|Query(pairs)| pairs).map_err(ApiError::bad_request)?;
    let platform = pairs.iter().find(|(key, _)| key == "platform").map(|(_, value)| value);
    let platform = platform_described(platform)?;
    let names: Vec<String> = pairs
        .into_iter()
        .filter(|(key, _)| key == "names")
        .flat_map(|(_, value)| ImageQuery { names: value, platform: None }.all_names())
        .collect();
    save(&state, &names, platform.as_ref())
}

fn save(state: &State, names: &[String], platform: Option<&Platform>) -> Result<Response, ApiError> {
    if names.is_empty() {
        return Err(ApiError::bad_request("no image is named: give names"));
    }
    let images = state.engine.images_to_save(names)?;
    for (image, _) in &images {
        state.engine.image_for(&image.id, platform)?;
    }
    let engine = state.engine.clone();
    Ok(written("application/x-tar", move |to| engine.save_images(&images, to)))
}

pub(super) async fn load(
    state: State,
    Query(query): Query<ImageQuery>,
    request: Request,
) -> Result<Response, ApiError> {
    let (engine, platform) = (state.engine.clone(), query.platform()?);
    let load = move |archive: &mut dyn std::io::Read| engine.load_images(archive, platform.as_ref());
    let loaded = read_body(request.into_body(), load).await;
    let values: Vec<Value> = match loaded.map_err(ApiError::internal)? {
        Ok(told) => told.iter().map(|text| json!({"stream": format!("{text}\n")})).collect(),
        Err(error) => vec![json_error(&with_causes(&error))],
    };
    let (lines, stream) = mpsc::channel(values.len().max(1));
    for value in values {
        // There is room for all of them.
        drop(lines.try_send(value));
    }
    Ok(json_lines(stream))
}

/// What is posted to an image.
pub(super) async fn post(
    state: State,
    Path(rest): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let param = |name: &str| query.get(name).map_or("", String::as_str);
    let (name, what) = rest.rsplit_once('/').unwrap_or(("", &rest));
    match what {
        "tag" => {
            let tag = if param("tag").is_empty() { String::new() } else { format!(":{}", param("tag")) };
            state.engine.tag(name, &format!("{}{tag}", param("repo")))?;
            Ok(StatusCode::CREATED.into_response())
        }
        "push" => push(&state, name, param("tag"), platform_described(query.get("platform"))?.as_ref(), &headers),
        other => Err(ApiError::not_found(format!("page not found: /images/{name}/{other}"))),
    }
}

fn push(
    state: &State,
    name: &str,
    tag: &str,
    platform: Option<&Platform>,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let credentials = credentials(headers);
    let engine = state.engine.clone();
    let names = if tag.is_empty() { engine.names_in(name) } else { vec![format!("{name}:{tag}")] };
    // What is not here is told before the stream begins.
    if names.is_empty() || names.iter().any(|name| engine.image(name).is_err()) {
        return Err(ApiError::not_found(format!("An image does not exist locally with the tag: {name}")));
    }
    for name in &names {
        engine.image_for(name, platform)?;
    }
    let repository = name.to_owned();
    let (lines, stream) = mpsc::channel(PROGRESS_AHEAD);
    tokio::spawn(async move {
        let begin = json!({"status": format!("The push refers to repository [{repository}]")});
        drop(lines.send(begin).await);
        for name in names {
            let (progress, steps) = mpsc::channel::<PullProgress>(PROGRESS_AHEAD);
            let pushed = async {
                let pushed = engine.push(&name, &credentials, &progress).await;
                drop(progress);
                pushed
            };
            let (pushed, ()) = tokio::join!(pushed, relay(steps, &lines));
            let failed = pushed.is_err();
            for value in
                pushed.map_or_else(|error| vec![json_error(&with_causes(&error))], |pushed| pushed_lines(&pushed))
            {
                drop(lines.send(value).await);
            }
            if failed {
                break;
            }
        }
    });
    Ok(json_lines(stream))
}

fn pushed_lines(Pushed { tag, digest, size_bytes }: &Pushed) -> Vec<Value> {
    vec![
        json!({"status": format!("{tag}: digest: {digest} size: {size_bytes}")}),
        json!({"progressDetail": {}, "aux": {"Tag": tag, "Digest": digest, "Size": size_bytes}}),
    ]
}

/// Hands on how far a pull or push has come.
async fn relay(mut steps: mpsc::Receiver<PullProgress>, lines: &mpsc::Sender<Value>) {
    while let Some(step) = steps.recv().await {
        // A client that went away does not stop it.
        drop(lines.send(step_line(&step)).await);
    }
}

fn step_line(step: &PullProgress) -> Value {
    let detail = step.bytes.map_or_else(|| json!({}), |(current, total)| json!({"current": current, "total": total}));
    json!({"status": step.status, "progressDetail": detail, "id": step.id})
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CreateQuery {
    from_image: Option<String>,
    from_src: Option<String>,
    repo: Option<String>,
    tag: Option<String>,
    message: Option<String>,
    platform: Option<String>,
}

/// What a client logs in with, from the header it sends it in.
pub(super) fn registry_auth(headers: &HeaderMap) -> Result<SecretBytes, ApiError> {
    Credentials::from_header(auth_header(headers)).map_err(ApiError::bad_request)?;
    Ok(SecretBytes::new(auth_header(headers).to_vec()))
}

fn auth_header(headers: &HeaderMap) -> &[u8] {
    headers.get("x-registry-auth").map_or(&[][..], |header| header.as_bytes())
}

fn credentials(headers: &HeaderMap) -> Credentials {
    // Clients that have none put a word in its place, which means nothing; the registry will say if it wants some.
    Credentials::from_header(auth_header(headers)).unwrap_or_default()
}

/// The platform that a parameter names, as `OS[/ARCHITECTURE[/VARIANT]]`.
pub(super) fn platform(text: &str) -> Result<Option<Platform>, ApiError> {
    let named = Some(text).filter(|text| !text.is_empty());
    named.map(|text| text.parse().map_err(ApiError::bad_request)).transpose()
}

/// The platform that a parameter describes, as members of JSON.
fn platform_described(text: Option<&String>) -> Result<Option<Platform>, ApiError> {
    let given = text.filter(|text| !text.is_empty());
    let read = given.map(|text| serde_json::from_str::<Platform>(text).map(|platform| platform.normal()));
    read.transpose().map_err(|error| ApiError::bad_request(format!("platform cannot be read: {error}")))
}

/// Pulls an image, or imports one.
pub(super) async fn create(state: State, request: Request) -> Result<Response, ApiError> {
    let Query(query): Query<CreateQuery> = Query::try_from_uri(request.uri()).map_err(ApiError::bad_request)?;
    let changes: Vec<(String, String)> =
        Query::try_from_uri(request.uri()).map(|Query(pairs)| pairs).map_err(ApiError::bad_request)?;
    let changes = changes.into_iter().filter(|(key, _)| key == "changes").map(|(_, value)| value).collect::<Vec<_>>();
    if let Some(source) = query.from_src.as_deref() {
        return import(state, source, &query, changes, request.into_body()).await;
    }
    let name = query.from_image.filter(|name| !name.is_empty());
    let name =
        name.ok_or_else(|| ApiError::bad_request("no image is named: give fromImage, or fromSrc to import one"))?;
    let name = match query.tag.filter(|tag| !tag.is_empty()) {
        Some(tag) if tag.contains(':') => format!("{name}@{tag}"),
        Some(tag) => format!("{name}:{tag}"),
        None => name,
    };
    if skep_engine::normalize(&name).is_none() {
        return Err(ApiError::bad_request(format!("invalid reference format: {name:?}")));
    }
    let platform = platform(query.platform.as_deref().unwrap_or_default())?;
    pull::run(&state, name, platform, credentials(request.headers())).await
}

async fn import(
    state: State,
    source: &str,
    query: &CreateQuery,
    changes: Vec<String>,
    body: Body,
) -> Result<Response, ApiError> {
    let fetched = match source {
        "-" => None,
        // Without a scheme, as docker takes it.
        url => {
            let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
            if !url.starts_with("http://") && !url.starts_with("https://") {
                return Err(ApiError::bad_request(format!("{url:?} cannot be fetched: name a URL of http or https")));
            }
            Some(skep_engine::fetch(&url).await.map_err(ApiError::bad_request)?)
        }
    };
    let repo = query.repo.clone().unwrap_or_default();
    let name = match query.tag.as_deref().filter(|tag| !tag.is_empty()) {
        Some(tag) => format!("{repo}:{tag}"),
        None => repo,
    };
    let message = query.message.clone().unwrap_or_default();
    let platform = platform(query.platform.as_deref().unwrap_or_default())?.unwrap_or_else(Platform::own);
    if platform.os != "linux" {
        return Err(ApiError::bad_request(format!(
            "operating system is not supported: {}: import for linux",
            platform.os
        )));
    }
    let engine = state.engine.clone();
    let import =
        move |archive: &mut dyn std::io::Read| engine.import_image(archive, &name, &message, &changes, platform);
    let body = fetched.map_or(body, Body::from);
    let imported = read_body(body, import).await;
    let image = imported.map_err(ApiError::internal)??;
    Ok(Json(json!({"status": image.id})).into_response())
}

pub(super) async fn remove(
    state: State,
    Path(name): Path<String>,
    Query(query): Query<ForceQuery>,
    Query(params): Query<BTreeMap<String, String>>,
) -> Result<Json<Vec<Value>>, ApiError> {
    state.engine.image_for(&name, platform_described(params.get("platforms"))?.as_ref())?;
    let removal = state.engine.remove_image(&name, query.is_on())?;
    Ok(Json(removal_json(&removal)))
}

fn removal_json(removal: &skep_engine::Removal) -> Vec<Value> {
    let untagged = removal.untagged.iter().map(|tag| json!({"Untagged": familiar(tag)}));
    untagged.chain(removal.deleted.iter().map(|id| json!({"Deleted": id}))).collect()
}

#[derive(Deserialize)]
pub(super) struct PruneQuery {
    filters: Option<String>,
}

/// Removes images without a name, or with `dangling=false` all that no container stands on.
pub(super) async fn prune(state: State, Query(query): Query<PruneQuery>) -> Result<Json<Value>, ApiError> {
    let known = ["dangling", "label", "label!", "until"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let dangling = filters.flag("dangling").map_err(ApiError::bad_request)?.unwrap_or(true);
    let until = filters.until().map_err(ApiError::bad_request)?;
    let wanted = |image: &Image| {
        (!dangling || image.tags.is_empty())
            && filters.labels("label", &image.config.labels)
            && !filters.any_label("label!", &image.config.labels)
            && until.is_none_or(|at| image.created < at)
    };
    let removal = state.engine.prune_images(wanted);
    Ok(Json(json!({"ImagesDeleted": or_null(removal_json(&removal)), "SpaceReclaimed": removal.bytes})))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct AuthBody {
    username: String,
    password: String,
    serveraddress: String,
    identitytoken: String,
}

/// Asks a registry whether it takes the credentials.
pub(super) async fn auth(state: State, body: axum::body::Bytes) -> Result<Json<Value>, ApiError> {
    let body: AuthBody = parse(&body)?;
    let credentials = if body.identitytoken.is_empty() {
        Credentials::Basic { username: body.username, password: SecretBytes::new(body.password.into_bytes()) }
    } else {
        Credentials::Token(SecretBytes::new(body.identitytoken.into_bytes()))
    };
    let asked = tokio::time::timeout(LOGIN_LIMIT, state.engine.login(&body.serveraddress, &credentials)).await;
    match asked {
        Ok(Ok(())) => Ok(Json(json!({"Status": "Login Succeeded", "IdentityToken": ""}))),
        Ok(Err(error @ EngineError::Pull(_))) => Err(ApiError::unauthorized(with_causes(&error))),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(ApiError::unauthorized(format!(
            "the registry {} did not answer in {LOGIN_LIMIT:?}",
            body.serveraddress
        ))),
    }
}

/// `/distribution/NAME/json`: what a name stands for in its registry.
pub(super) async fn distribution(
    state: State,
    Path(rest): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let name = rest.strip_suffix("/json").ok_or_else(|| ApiError::not_found("page not found"))?;
    if skep_engine::is_builtin(name) {
        return Err(ApiError::not_found(format!("{name} is built in: no registry has it")));
    }
    let resolved = state.engine.resolve(name, &credentials(&headers)).await?;
    Ok(Json(json!({
        "Descriptor": {"mediaType": resolved.media_type, "digest": resolved.digest, "size": resolved.size_bytes},
        "Platforms": resolved.platforms,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_matched_with_and_without_tag() {
        assert!(matches_reference("busybox:1", "busybox") && matches_reference("busybox:1", "busybox:1"));
        assert!(matches_reference("busybox:1", "busy*") && matches_reference("a/b:1", "*/b"));
        assert!(!matches_reference("a/b:1", "*") && !matches_reference("busybox:1", "busybox:2"));
    }
}
