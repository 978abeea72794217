//! Request bodies: `null` means absent, as Go's clients mean it; what is not supported is refused.

mod any_case;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize as _;
use serde::de::DeserializeOwned;
use serde_json::Value;
use skep_api::container::SeccompOptions;
use skep_api::expansion::TemplateContext;

use self::any_case::AnyCase;
use super::ApiError;

/// Members of a service's spec that are known and not supported yet.
const UNSUPPORTED: [(&str, &str); 4] = [
    ("/TaskTemplate/PluginSpec", "a plugin as a service"),
    ("/TaskTemplate/NetworkAttachmentSpec", "an attachment as a service"),
    ("/TaskTemplate/ContainerSpec/Privileges/CredentialSpec", "a credential spec"),
    ("/TaskTemplate/Resources/SwapBytes", "a swap limit"),
];

/// A body that says that it is JSON, or does not say what it is.
pub(super) struct JsonBody(Bytes);

impl std::ops::Deref for JsonBody {
    type Target = Bytes;

    fn deref(&self) -> &Bytes {
        &self.0
    }
}

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let kind = require_json(request.headers());
        let bytes = Bytes::from_request(request, state).await.map_err(IntoResponse::into_response)?;
        match kind {
            Err(error) if !bytes.is_empty() => Err(error.into_response()),
            _ => Ok(Self(bytes)),
        }
    }
}

/// Refuses a body that says that it is something else.
pub(super) fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| String::from_utf8_lossy(kind.as_bytes()));
    let is_json =
        |kind: &str| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
    match kind {
        Some(kind) if !is_json(&kind) => {
            Err(ApiError::bad_request(format!("unsupported Content-Type header ({kind}): must be 'application/json'")))
        }
        _ => Ok(()),
    }
}

/// Reads a body.
pub(super) fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    from_value(read(body)?)
}

/// Reads a service's spec.
pub(super) fn parse_service(body: &Bytes) -> Result<skep_api::ServiceSpec, ApiError> {
    let mut value = read(body)?;
    settle_mode(&mut value);
    for (pointer, what) in UNSUPPORTED {
        if value.pointer(pointer).is_some_and(says_something) {
            return Err(ApiError::unsupported(format!("{what} is not supported yet")));
        }
    }
    settle_networks(&mut value);
    let spec: skep_api::ServiceSpec = from_value(value)?;
    check_filter(&spec).map_err(ApiError::bad_request)?;
    let sample = TemplateContext::sample(&spec.name, &spec.labels);
    spec.task_template.container.filled(&sample).map_err(ApiError::bad_request)?;
    Ok(spec)
}

/// Whether the nodes will be able to read the system-call filter.
fn check_filter(spec: &skep_api::ServiceSpec) -> Result<(), String> {
    let privileges = spec.task_template.container.privileges.as_ref();
    let custom = privileges.and_then(|privileges| privileges.seccomp.as_ref()).map(SeccompOptions::custom);
    let Some(profile) = custom.transpose()?.flatten() else { return Ok(()) };
    skep_engine::seccomp_profile(&profile)
        .map(drop)
        .map_err(|error| format!("the seccomp profile cannot be used: {error}"))
}

/// Dockerd takes members' names in any case, and some clients write the mode's in small letters.
fn settle_mode(spec: &mut Value) {
    let Some(mode) = spec.get_mut("Mode").and_then(Value::as_object_mut) else { return };
    for name in ["Replicated", "Global", "ReplicatedJob", "GlobalJob"] {
        let other = mode.keys().find(|key| key.as_str() != name && key.eq_ignore_ascii_case(name)).cloned();
        if let Some(value) = other.and_then(|key| mode.remove(&key)) {
            mode.insert(name.to_owned(), value);
        }
    }
}

/// Old clients name networks beside the task's template; and what every host has is meant by name.
fn settle_networks(spec: &mut Value) {
    if let Some(networks) = spec.as_object_mut().and_then(|spec| spec.remove("Networks"))
        && spec.pointer("/TaskTemplate/Networks").is_none()
    {
        spec["TaskTemplate"]["Networks"] = networks;
    }
    let networks = spec.pointer_mut("/TaskTemplate/Networks").and_then(Value::as_array_mut);
    for network in networks.into_iter().flatten() {
        if let Some(name) = network["Target"].as_str().and_then(super::networks::predefined_name) {
            network["Target"] = Value::from(name);
        }
    }
}

/// As Go writes a list that nothing was put into.
pub(super) fn or_null<T: serde::Serialize>(list: Vec<T>) -> Value {
    if list.is_empty() { Value::Null } else { serde_json::json!(list) }
}

/// A body as JSON, without members that are null.
pub(super) fn read(body: &Bytes) -> Result<Value, ApiError> {
    if body.is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    let mut values = serde_json::Deserializer::from_slice(body);
    let mut value = Value::deserialize(&mut values)
        .map_err(|error| ApiError::bad_request(format!("invalid JSON: the request's body cannot be read: {error}")))?;
    values.end().map_err(|_| ApiError::bad_request("unexpected content after JSON: send one value"))?;
    drop_nulls(&mut value);
    Ok(value)
}

pub(super) fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    T::deserialize(AnyCase(value))
        .map_err(|error| ApiError::bad_request(format!("the request cannot be read: {error}")))
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Objects say something by being there, lists and switches by what they hold.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Array(list) => !list.is_empty(),
        Value::Bool(on) => *on,
        Value::Null => false,
        Value::Object(_) | Value::Number(_) | Value::String(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, want: Result<(), &str>) {
        use axum::response::IntoResponse as _;
        let got = parse_service(&Bytes::from(json.to_owned())).map(drop);
        match (got, want) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(part)) => {
                assert!(format!("{error:?}").contains(part), "{error:?} should say {part}");
                assert_eq!(error.into_response().status(), axum::http::StatusCode::NOT_IMPLEMENTED);
            }
            (got, want) => panic!("{got:?} instead of {want:?}"),
        }
    }

    #[test]
    fn networks_are_read_from_both_places() {
        let read = |json: &str| {
            let spec = parse_service(&Bytes::from(json.to_owned())).unwrap();
            spec.task_template.networks.iter().map(|wanted| wanted.target.clone()).collect::<Vec<_>>()
        };
        assert_eq!(read(r#"{"TaskTemplate":{"Networks":[{"Target":"n"}]}}"#), ["n"]);
        assert_eq!(read(r#"{"Networks":[{"Target":"old"}]}"#), ["old"]);
        assert_eq!(read(r#"{"Networks":[{"Target":"a"}],"TaskTemplate":{"Networks":[{"Target":"b"}]}}"#), ["b"]);
    }

    #[test]
    fn a_mode_is_read_in_any_case() {
        let body = Bytes::from_static(br#"{"Mode":{"replicated":{"Replicas":2}}}"#);
        let spec = parse_service(&body).unwrap();
        assert!(serde_json::to_string(&spec.mode).unwrap().contains(r#""Replicas":2"#));
        let job = parse_service(&Bytes::from_static(br#"{"Mode":{"globaljob":{}}}"#)).unwrap();
        assert_eq!(job.mode, skep_api::ServiceMode::GlobalJob);
    }

    #[test]
    fn nulls_are_absent_and_what_is_not_supported_is_refused_by_name() {
        check(r#"{"Name":"a","Labels":null,"TaskTemplate":{"ContainerSpec":{"Image":"i","Env":null}}}"#, Ok(()));
        check(r#"{"TaskTemplate":{"PluginSpec":{}}}"#, Err("a plugin as a service"));
    }
}
