//! Errors as the Engine API tells them: `{"message": …}` with a status.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use skep_engine::{EngineError, PullError, VolumeError};
use skep_manager::ReadError;
use skep_manager::control::{ControlError, Reason};

use crate::swarm::SwarmError;

/// What a client is told.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, message: impl ToString) -> Self {
        Self { status, message: message.to_string() }
    }

    /// What the client is told.
    pub(crate) fn text(&self) -> &str {
        &self.message
    }

    pub(crate) fn bad_request(message: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn forbidden(message: impl ToString) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    pub(crate) fn not_found(message: impl ToString) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub(crate) fn is_not_found(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    /// The same words, but the request is to blame: clients take "not found" for an image to be pulled.
    pub(crate) fn blame_request(mut self) -> Self {
        if self.status == StatusCode::NOT_FOUND {
            self.status = StatusCode::BAD_REQUEST;
        }
        self
    }

    pub(crate) fn internal(message: impl ToString) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub(crate) fn unauthorized(message: impl ToString) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    pub(crate) fn conflict(message: impl ToString) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    pub(crate) fn unsupported(message: impl ToString) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(json!({"message": self.message}))).into_response()
    }
}

impl From<SwarmError> for ApiError {
    fn from(error: SwarmError) -> Self {
        let status = match error {
            SwarmError::AlreadyMember
            | SwarmError::NotMember
            | SwarmError::NotManager
            | SwarmError::ManagerAway(_)
            | SwarmError::Locked
            | SwarmError::Refused(_) => StatusCode::SERVICE_UNAVAILABLE,
            SwarmError::NotLocked => StatusCode::CONFLICT,
            SwarmError::Invalid(_) => StatusCode::BAD_REQUEST,
            SwarmError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error)
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let status = match error.reason {
            Reason::Invalid => StatusCode::BAD_REQUEST,
            Reason::NotFound => StatusCode::NOT_FOUND,
            Reason::Conflict | Reason::Settling => StatusCode::CONFLICT,
            // Docker answers 500, and clients look for the text.
            Reason::Stale => StatusCode::INTERNAL_SERVER_ERROR,
            Reason::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Reason::NotLeader | Reason::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.message)
    }
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, error)
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let status = match &error {
            EngineError::NoContainer(_)
            | EngineError::NoImage(_)
            | EngineError::OtherPlatform { .. }
            | EngineError::NoExec(_)
            | EngineError::NoNetwork(_)
            | EngineError::NoFile { .. }
            | EngineError::NoVolume(_) => StatusCode::NOT_FOUND,
            EngineError::NameTaken { .. }
            | EngineError::WrongState { .. }
            | EngineError::Conflict(_)
            | EngineError::Volume(VolumeError::Differs(_)) => StatusCode::CONFLICT,
            EngineError::Forbidden(_) => StatusCode::FORBIDDEN,
            EngineError::LogsNotKept(_) => StatusCode::NOT_IMPLEMENTED,
            EngineError::Volume(VolumeError::Disk(..)) => StatusCode::INTERNAL_SERVER_ERROR,
            EngineError::Signal(_)
            | EngineError::Invalid(_)
            | EngineError::Volume(_)
            | EngineError::Start { .. }
            | EngineError::Pull(PullError::Name(_)) => StatusCode::BAD_REQUEST,
            EngineError::Pull(PullError::Absent { .. } | PullError::Push { .. } | PullError::Platform { .. }) => {
                StatusCode::NOT_FOUND
            }
            EngineError::Pull(_) | EngineError::Disk { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, skep_api::with_causes(&error))
    }
}
