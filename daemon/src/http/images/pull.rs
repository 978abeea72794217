//! Images on their way from a registry.

use std::sync::Arc;

use axum::response::Response;
use serde_json::{Value, json};
use skep_api::with_causes;
use skep_engine::{Credentials, Engine, EngineError, Image, Platform, PullProgress, familiar};
use tokio::sync::{mpsc, oneshot};

use super::super::stream::{json_error, json_lines};
use super::super::{ApiError, State};
use super::{PROGRESS_AHEAD, relay, step_line};

/// Pulls an image, or all of a repository if `name` has no tag. What fails before anything has come is the answer itself.
pub(super) async fn run(
    state: &State,
    name: String,
    platform: Option<Platform>,
    credentials: Credentials,
) -> Result<Response, ApiError> {
    let (lines, stream) = mpsc::channel::<Value>(PROGRESS_AHEAD);
    let (beginning, begun) = oneshot::channel();
    let engine = state.engine.clone();
    tokio::spawn(async move {
        let mut pull = Pull { engine, platform, credentials, lines, beginning: Some(beginning) };
        let failed = match pull.engine.names_in_registry(&name, &pull.credentials).await {
            Ok(names) => pull.all(&names).await.err(),
            Err(error) => Some(error),
        };
        match (failed, pull.beginning) {
            (Some(error), Some(beginning)) => drop(beginning.send(Err(error))),
            (Some(error), None) => drop(pull.lines.send(json_error(&with_causes(&error))).await),
            (None, _) => {}
        }
    });
    match begun.await {
        Ok(Err(error)) => Err(error.into()),
        _ => Ok(json_lines(stream)),
    }
}

/// What is pulled, and who is told of it. A client that went away does not stop it.
struct Pull {
    engine: Arc<Engine>,
    platform: Option<Platform>,
    credentials: Credentials,
    lines: mpsc::Sender<Value>,
    /// Until something has come.
    beginning: Option<oneshot::Sender<Result<(), EngineError>>>,
}

impl Pull {
    async fn all(&mut self, names: &[String]) -> Result<(), EngineError> {
        for name in names {
            self.one(name).await?;
        }
        Ok(())
    }

    async fn one(&mut self, name: &str) -> Result<(), EngineError> {
        let last = name.rsplit('/').next().unwrap_or(name);
        let tag = last.split_once(':').map_or("latest", |(_, tag)| tag);
        let repository = skep_engine::repository_path(name).unwrap_or_default();
        let begin = json!({"status": format!("Pulling from {repository}"), "id": tag});
        let before = self.engine.image(name).ok().map(|image| image.id);
        let (progress, mut steps) = mpsc::channel::<PullProgress>(PROGRESS_AHEAD);
        let pulled = async {
            let pulled = self.engine.pull(name, self.platform.as_ref(), &self.credentials, &progress).await;
            drop(progress);
            pulled
        };
        let beginning = &mut self.beginning;
        let told = async {
            let Some(first) = steps.recv().await else { return false };
            beginning.take().map(|beginning| beginning.send(Ok(())));
            drop(self.lines.send(begin.clone()).await);
            drop(self.lines.send(step_line(&first)).await);
            relay(steps, &self.lines).await;
            true
        };
        let (image, told) = tokio::join!(pulled, told);
        let image = image?;
        if !told {
            self.beginning.take().map(|beginning| beginning.send(Ok(())));
            drop(self.lines.send(begin).await);
        }
        for line in last_lines(name, &image, before.as_ref() == Some(&image.id)) {
            drop(self.lines.send(line).await);
        }
        Ok(())
    }
}

fn last_lines(name: &str, image: &Image, was_here: bool) -> [Value; 2] {
    let digests = image.digests.iter().filter_map(|pinned| pinned.split_once('@'));
    let digest = digests.map(|(_, digest)| digest).next_back();
    let news = if was_here { "Image is up to date for" } else { "Downloaded newer image for" };
    [
        json!({"status": format!("Digest: {}", digest.unwrap_or(&image.id))}),
        json!({"status": format!("Status: {news} {}", familiar(name))}),
    ]
}
