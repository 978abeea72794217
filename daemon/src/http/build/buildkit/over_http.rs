//! Builds of clients that have BuildKit but ask for it as for a classic build (`DOCKER_BUILDKIT=1` before docker's
//! client 23): the session is opened beside, and the build is followed in the answer.

use std::collections::HashMap;

use axum::extract::Request;
use axum::http::Uri;
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use skep_api::buildkit::{Exporter, SolveRequest, SolveResponse, StatusResponse};
use tokio::sync::mpsc;
use tonic::Status;
use tonic_prost::prost::Message as _;

use super::Served;
use super::output::Output;
use crate::http::build::{BuildQuery, Context, LINES_AHEAD, lists, map};
use crate::http::stream::{json_error, json_lines};
use crate::http::swarm::is_on;
use crate::http::{ApiError, State};

/// What such a client gives for the context where it has it in its session.
const OF_SESSION: &str = "client-session";

/// Builds what a classic request asks for, by BuildKit's ways.
pub(in crate::http::build) async fn build(
    state: &State,
    request: Request,
    query: &BuildQuery,
) -> Result<Response, ApiError> {
    let wanted = wanted(request.uri(), query)?;
    Output::read(&wanted).map_err(|status| ApiError::bad_request(status.message()))?;
    let given = match query.remote.as_str() {
        "" => Some(Context::of_body(&state.engine, request).await?),
        _ => None,
    };
    let served = Served { daemon: state.0.clone() };
    let job = served.kit().jobs.begin(&wanted.r#ref, &wanted.session, given);
    let job = job.map_err(|status| ApiError::internal(status.message()))?;
    let (lines, stream) = mpsc::channel(LINES_AHEAD);
    let quiet = is_on(&query.q);
    tokio::spawn(async move {
        let following = job.clone();
        let solving = async {
            let solved = served.solve_job(&job, &wanted).await;
            job.progress.end();
            solved
        };
        let following = async {
            let mut seen = 0;
            while let Some(told) = following.progress.next(seen).await {
                seen += 1;
                if quiet {
                    continue;
                }
                if lines.send(trace(&told)).await.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::pin!(solving, following);
        let solved = tokio::select! {
            solved = &mut solving => {
                // What is not told yet goes before.
                following.await;
                solved
            }
            there = &mut following => match there {
                true => solving.await,
                // The client is gone, and the build with it.
                false => return,
            },
        };
        drop(lines.send(ending(solved, quiet)).await);
    });
    Ok(json_lines(stream))
}

fn trace(told: &StatusResponse) -> Value {
    json!({"id": "moby.buildkit.trace", "aux": BASE64_STANDARD.encode(told.encode_to_vec())})
}

fn ending(solved: Result<SolveResponse, Status>, quiet: bool) -> Value {
    match solved {
        Ok(solved) => {
            let id = solved.exporter_response.get("containerimage.digest").map(String::as_str).unwrap_or_default();
            if quiet { json!({"stream": format!("{id}\n")}) } else { json!({"id": "moby.image.id", "aux": {"ID": id}}) }
        }
        Err(status) => json_error(&format!("failed to solve: {}", status.message())),
    }
}

/// The same as clients of BuildKit's API would ask for it.
fn wanted(uri: &Uri, query: &BuildQuery) -> Result<SolveRequest, ApiError> {
    if query.session.is_empty() {
        return Err(ApiError::bad_request(
            "a build by BuildKit (version=2) needs a session: give its id, or ask for version=1",
        ));
    }
    let (tags, hosts) = lists(uri)?;
    let mut attributes = HashMap::new();
    let mut set = |name: &str, value: &str| {
        if !value.is_empty() {
            attributes.insert(name.to_owned(), value.to_owned());
        }
    };
    set("filename", &query.dockerfile);
    set("target", &query.target);
    set("platform", &query.platform);
    set("cgroup-parent", &query.cgroupparent);
    if query.remote != OF_SESSION {
        set("context", &query.remote);
    }
    if is_on(&query.pull) {
        set("image-resolve-mode", "pull");
    }
    if query.shmsize > 0 {
        set("shm-size", &query.shmsize.to_string());
    }
    match query.networkmode.as_str() {
        "" | "default" => {}
        mode @ ("host" | "none") => set("force-network-mode", mode),
        other => return Err(ApiError::unsupported(format!("network mode {other:?} is not supported with BuildKit"))),
    }
    let limits = map::<Vec<skep_api::container::Ulimit>>("ulimits", &query.ulimits)?;
    let limits = limits.iter().map(|limit| format!("{}={}:{}", limit.name, limit.soft, limit.hard));
    set("ulimit", &limits.collect::<Vec<_>>().join(","));
    let hosts = hosts.iter().filter_map(|line| line.split_once('\t')).map(|(ip, name)| format!("{name}={ip}"));
    set("add-hosts", &hosts.collect::<Vec<_>>().join(","));
    for (name, value) in map::<HashMap<String, Option<String>>>("buildargs", &query.buildargs)? {
        set(&format!("build-arg:{name}"), &value.unwrap_or_default());
    }
    for (name, value) in map::<HashMap<String, String>>("labels", &query.labels)? {
        attributes.insert(format!("label:{name}"), value);
    }
    if is_on(&query.nocache) {
        attributes.insert("no-cache".to_owned(), String::new());
    }
    Ok(SolveRequest {
        r#ref: format!("{:016x}", rand::random::<u64>()),
        session: query.session.clone(),
        frontend: "dockerfile.v0".to_owned(),
        frontend_attrs: attributes,
        exporters: vec![exporter(query, &tags)?],
        ..SolveRequest::default()
    })
}

fn exporter(query: &BuildQuery, tags: &[String]) -> Result<Exporter, ApiError> {
    #[derive(serde::Deserialize)]
    struct Wanted {
        #[serde(alias = "Type")]
        r#type: String,
        #[serde(default, alias = "Attrs")]
        attrs: Option<HashMap<String, String>>,
    }
    let mut exporter = match map::<Vec<Wanted>>("outputs", &query.outputs)?.into_iter().next() {
        Some(wanted) if wanted.r#type == "cacheonly" => Exporter::default(),
        Some(wanted) => Exporter { kind: wanted.r#type, attrs: wanted.attrs.unwrap_or_default() },
        None => Exporter { kind: "moby".to_owned(), ..Exporter::default() },
    };
    if !tags.is_empty() {
        exporter.attrs.insert("name".to_owned(), tags.join(","));
    }
    Ok(exporter)
}
