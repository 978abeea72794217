//! Being attached to a container over a WebSocket: output comes in binary messages, input goes in any.

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query};
use axum::response::Response;
use futures::{SinkExt as _, StreamExt as _};
use skep_engine::{Attachment, LogSource};

use super::attach::AttachQuery;
use crate::http::swarm::is_on;
use crate::http::{ApiError, State};

pub(in crate::http) async fn attach(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<AttachQuery>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let container = state.engine.inspect(&id)?;
    let upgrade = upgrade.map_err(ApiError::bad_request)?;
    let attachment = state.engine.attach(&id)?;
    let takes_input = is_on(&query.stdin) && container.config.open_stdin;
    let stop = state.stop.clone();
    Ok(upgrade.on_upgrade(move |socket| async move {
        let Ok(attachment) = attachment.await else { return };
        tokio::select! {
            () = stop.cancelled() => {}
            () = relay(socket, attachment, &query, takes_input) => {}
        }
    }))
}

async fn relay(socket: WebSocket, attachment: Attachment, query: &AttachQuery, takes_input: bool) {
    let Attachment { mut output, mut input } = attachment;
    let (mut to_client, mut from_client) = socket.split();
    let outgoing = async {
        while let Some((source, bytes)) = output.next().await {
            let wanted = match source {
                LogSource::Stdout => is_on(&query.stdout),
                LogSource::Stderr => is_on(&query.stderr),
            };
            if wanted && to_client.send(Message::Binary(bytes.into())).await.is_err() {
                return;
            }
        }
        // A client that is gone needs no farewell.
        drop(to_client.close().await);
    };
    let incoming = async {
        while let Some(Ok(message)) = from_client.next().await {
            let sent = match message {
                Message::Binary(bytes) if takes_input => input.send(&bytes).await,
                Message::Text(text) if takes_input => input.send(text.as_bytes()).await,
                Message::Close(_) => return,
                Message::Binary(_) | Message::Text(_) | Message::Ping(_) | Message::Pong(_) => Ok(()),
            };
            if sent.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = outgoing => {}
        () = incoming => {}
    }
}
