//! Images of this host, and what registries say of names.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query};
use axum::http::HeaderMap;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::SecretBytes;
use skep_engine::{Credentials, Image, PullProgress, familiar};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use super::{ApiError, State};

const PROGRESS_AHEAD: usize = 256;

fn tags(image: &Image) -> Vec<&str> {
    image.tags.iter().map(|tag| familiar(tag)).collect()
}

fn digests(image: &Image) -> Vec<&str> {
    image.digests.iter().map(|digest| familiar(digest)).collect()
}

pub(super) async fn list(state: State) -> Json<Vec<Value>> {
    let images = state.engine.images();
    let value = |image: &Image| {
        json!({
            "Id": image.id, "ParentId": "", "RepoTags": tags(image), "RepoDigests": digests(image),
            "Created": image.created.as_nanos() / 1_000_000_000, "Size": image.size_bytes, "SharedSize": -1,
            "Labels": image.config.labels, "Containers": -1,
        })
    };
    Json(images.iter().map(value).collect())
}

/// `/images/NAME/json`: names have slashes, so the path is taken apart here.
pub(super) async fn get(state: State, Path(rest): Path<String>) -> Result<Json<Value>, ApiError> {
    let Some(name) = rest.strip_suffix("/json") else {
        return Err(ApiError::unsupported(format!("/images/{rest} is not supported yet by this version of skep")));
    };
    let image = state.engine.image(name)?;
    Ok(Json(json!({
        "Id": image.id, "RepoTags": tags(&image), "RepoDigests": digests(&image), "Parent": "", "Comment": "",
        "Created": image.created, "Architecture": image.architecture, "Os": image.os, "Size": image.size_bytes,
        "Config": image.config, "RootFS": {"Type": "layers", "Layers": image.layers},
        "GraphDriver": {"Name": "overlay2", "Data": {}}, "Metadata": {},
    })))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PullQuery {
    from_image: Option<String>,
    tag: Option<String>,
}

/// What a client logs in with, from the header it sends it in.
pub(super) fn registry_auth(headers: &HeaderMap) -> Result<SecretBytes, ApiError> {
    let header = headers.get("x-registry-auth").map_or(&[][..], |header| header.as_bytes());
    Credentials::from_header(header).map_err(ApiError::bad_request)?;
    Ok(SecretBytes::new(header.to_vec()))
}

fn credentials(headers: &HeaderMap) -> Result<Credentials, ApiError> {
    Credentials::from_header(registry_auth(headers)?.expose()).map_err(ApiError::bad_request)
}

pub(super) async fn pull(
    state: State,
    Query(query): Query<PullQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let name = query.from_image.ok_or_else(|| ApiError::unsupported("importing images is not supported yet"))?;
    let name = match query.tag.filter(|tag| !tag.is_empty()) {
        Some(tag) if tag.contains(':') => format!("{name}@{tag}"),
        Some(tag) => format!("{name}:{tag}"),
        None => name,
    };
    let credentials = credentials(&headers)?;
    let (progress, mut steps) = mpsc::channel::<PullProgress>(PROGRESS_AHEAD);
    let (lines, stream) = mpsc::channel::<Value>(PROGRESS_AHEAD);
    let engine = state.engine.clone();
    tokio::spawn(async move {
        let told = lines.clone();
        let relay = async move {
            while let Some(step) = steps.recv().await {
                // A client that went away does not stop the pull.
                drop(told.send(json!({"status": step.status, "progressDetail": {}, "id": step.id})).await);
            }
        };
        let pulled = async {
            let pulled = engine.pull(&name, &credentials, &progress).await;
            drop(progress);
            pulled
        };
        let (pulled, ()) = tokio::join!(pulled, relay);
        let last = match pulled {
            Ok(image) => json!({"status": format!("Status: image {} is here as {}", familiar(&name), image.id)}),
            Err(error) => {
                let text = error.to_string();
                json!({"error": text, "errorDetail": {"message": text}})
            }
        };
        drop(lines.send(last).await);
    });
    let body = ReceiverStream::new(stream).map(|value| Ok::<_, std::convert::Infallible>(format!("{value}\r\n")));
    Ok(([("content-type", "application/json")], Body::from_stream(body)).into_response())
}

pub(super) async fn remove(state: State, Path(name): Path<String>) -> Result<Json<Vec<Value>>, ApiError> {
    let removal = state.engine.remove_image(&name)?;
    let untagged = removal.untagged.iter().map(|tag| json!({"Untagged": familiar(tag)}));
    Ok(Json(untagged.chain(removal.deleted.iter().map(|id| json!({"Deleted": id}))).collect()))
}

/// `/distribution/NAME/json`: what a name stands for in its registry.
pub(super) async fn distribution(
    state: State,
    Path(rest): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let name = rest.strip_suffix("/json").ok_or_else(|| ApiError::not_found("page not found"))?;
    let normal = |name: &str| skep_engine::normalize(name);
    if normal(name).is_some() && normal(name) == normal(skep_engine::WHOAMI) {
        return Err(ApiError::not_found(format!("{name} is built in: no registry has it")));
    }
    let resolved = state.engine.resolve(name, &credentials(&headers)?).await?;
    let platforms: Vec<_> =
        resolved.platforms.iter().map(|(os, arch)| json!({"architecture": arch, "os": os})).collect();
    Ok(Json(json!({
        "Descriptor": {"mediaType": resolved.media_type, "digest": resolved.digest, "size": resolved.size_bytes},
        "Platforms": platforms,
    })))
}
