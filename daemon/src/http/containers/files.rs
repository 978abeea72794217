//! Files of containers: copied in and out, compared, kept as images.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::TryStreamExt as _;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_engine::{Archiving, Change, CommitOptions, PathStat, Writing};
use tokio::io::AsyncWriteExt as _;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::http::json::{read, require_json};
use crate::http::swarm::is_on;
use crate::http::{ApiError, State};

#[derive(Deserialize)]
pub(in crate::http) struct PathQuery {
    #[serde(default)]
    path: String,
}

/// A mode as Go's `os.FileMode` has it.
fn go_mode(mode: u32) -> u32 {
    let kind = match mode & 0o170_000 {
        0o040_000 => 1 << 31,
        0o120_000 => 1 << 27,
        0o010_000 => 1 << 25,
        0o140_000 => 1 << 24,
        0o020_000 => (1 << 26) | (1 << 21),
        0o060_000 => 1 << 26,
        _ => 0,
    };
    let special = [(0o4000, 1 << 23), (0o2000, 1 << 22), (0o1000, 1 << 20)];
    let special: u32 = special.iter().filter(|(bit, _)| mode & bit != 0).map(|(_, go)| go).sum();
    kind | special | (mode & 0o777)
}

fn stat_header(stat: &PathStat) -> Result<HeaderValue, ApiError> {
    let value = json!({"name": stat.name, "size": stat.size_bytes, "mode": go_mode(stat.mode), "mtime": stat.modified,
        "linkTarget": stat.link_target});
    BASE64_STANDARD.encode(value.to_string()).parse().map_err(ApiError::internal)
}

const STAT: &str = "x-docker-container-path-stat";

pub(in crate::http) async fn stat(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<PathQuery>,
) -> Result<Response, ApiError> {
    let stat = state.engine.stat_path(&id, &query.path).await?;
    let mut headers = HeaderMap::new();
    headers.insert(STAT, stat_header(&stat)?);
    Ok((headers, ()).into_response())
}

pub(in crate::http) async fn get(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<PathQuery>,
) -> Result<Response, ApiError> {
    let stat = state.engine.stat_path(&id, &query.path).await?;
    let archiving = state.engine.read_archive(&id, &query.path).await?;
    let mut response = outgoing(archiving)?;
    response.headers_mut().insert(STAT, stat_header(&stat)?);
    Ok(response)
}

pub(in crate::http) async fn export(state: State, Path(id): Path<String>) -> Result<Response, ApiError> {
    outgoing(state.engine.export(&id).await?)
}

/// What a helper writes, as a body.
fn outgoing(mut archiving: Archiving) -> Result<Response, ApiError> {
    let stdout = archiving.child.stdout.take().ok_or_else(|| ApiError::internal("the archiver has no output"))?;
    let pieces = ReaderStream::with_capacity(stdout, 64 << 10);
    let end =
        futures::stream::once(
            async move { archiving.finish().await.map(|()| Bytes::new()).map_err(std::io::Error::other) },
        );
    let body = Body::from_stream(futures::StreamExt::chain(pieces, end));
    Ok(([(header::CONTENT_TYPE, "application/x-tar")], body).into_response())
}

#[derive(Deserialize)]
pub(in crate::http) struct PutQuery {
    #[serde(default)]
    path: String,
    #[serde(default, rename = "noOverwriteDirNonDir")]
    keeps_kinds: String,
    #[serde(default, rename = "copyUIDGID")]
    as_user: String,
}

pub(in crate::http) async fn put(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<PutQuery>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let how = Writing { keeps_kinds: is_on(&query.keeps_kinds), as_user: is_on(&query.as_user) };
    let mut archiving = state.engine.write_archive(&id, &query.path, how).await?;
    let mut stdin = archiving.child.stdin.take().ok_or_else(|| ApiError::internal("the archiver has no input"))?;
    let stream = request.into_body().into_data_stream().map_err(std::io::Error::other);
    // If the helper ends early, it says why; that is what the client hears.
    let copied = tokio::io::copy(&mut StreamReader::new(stream), &mut stdin).await;
    let closed = stdin.shutdown().await;
    drop(stdin);
    archiving.finish().await?;
    copied.map(drop).and(closed).map_err(|error| ApiError::bad_request(format!("the archive was cut off: {error}")))?;
    Ok(StatusCode::OK)
}

pub(in crate::http) async fn changes(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let changes = state.engine.changes(&id)?;
    let value = |(path, change): &(String, Change)| {
        let kind = match change {
            Change::Modified => 0,
            Change::Added => 1,
            Change::Deleted => 2,
        };
        json!({"Path": path, "Kind": kind})
    };
    // As clients expect it.
    let none = changes.is_empty();
    Ok(Json(if none { Value::Null } else { changes.iter().map(value).collect() }))
}

/// Keeps a container as an image.
pub(in crate::http) async fn commit(state: State, request: Request) -> Result<(StatusCode, Json<Value>), ApiError> {
    let pairs: Vec<(String, String)> =
        Query::try_from_uri(request.uri()).map(|Query(pairs)| pairs).map_err(ApiError::bad_request)?;
    let changes = pairs.iter().filter(|(key, _)| key == "changes").map(|(_, value)| value.clone()).collect();
    let query: BTreeMap<String, String> = pairs.into_iter().collect();
    let param = |name: &str| query.get(name).cloned().unwrap_or_default();
    let is_json = require_json(request.headers());
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.map_err(ApiError::bad_request)?;
    if !body.is_empty() {
        is_json?;
    }
    let config = read(&body)?;
    let config = if config.as_object().is_some_and(|members| !members.is_empty()) {
        Some(crate::http::json::from_value(config)?)
    } else {
        None
    };
    let name = match (param("repo"), param("tag")) {
        (repo, tag) if tag.is_empty() => repo,
        (repo, tag) => format!("{repo}:{tag}"),
    };
    let options = CommitOptions { name, comment: param("comment"), author: param("author"), changes, config };
    let image = state.engine.commit(&param("container"), options).await?;
    Ok((StatusCode::CREATED, Json(json!({"Id": image.id}))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_told_as_go_has_them() {
        assert_eq!(go_mode(0o100_644), 0o644);
        assert_eq!(go_mode(0o040_755), (1 << 31) | 0o755);
        assert_eq!(go_mode(0o104_755), (1 << 23) | 0o755);
        assert_eq!(go_mode(0o120_777), (1 << 27) | 0o777);
    }
}
