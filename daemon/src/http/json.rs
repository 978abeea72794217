//! Request bodies: `null` means absent, as Go's clients mean it; what is not supported is refused.

use axum::body::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ApiError;

/// Members of a service's spec that are known and not supported yet.
const UNSUPPORTED: [(&str, &str); 14] = [
    ("/Mode/ReplicatedJob", "mode replicated-job"),
    ("/Mode/GlobalJob", "mode global-job"),
    ("/TaskTemplate/PluginSpec", "a plugin as a service"),
    ("/TaskTemplate/NetworkAttachmentSpec", "an attachment as a service"),
    ("/TaskTemplate/Networks", "attaching services to networks (--network)"),
    ("/Networks", "attaching services to networks (--network)"),
    ("/TaskTemplate/Resources/Reservations/GenericResources", "generic resources"),
    ("/TaskTemplate/ContainerSpec/TTY", "a terminal (--tty) for services"),
    ("/TaskTemplate/ContainerSpec/OpenStdin", "standard input (OpenStdin) for services"),
    ("/TaskTemplate/ContainerSpec/Privileges/CredentialSpec", "a credential spec"),
    ("/TaskTemplate/ContainerSpec/Privileges/SELinuxContext", "an SELinux context"),
    ("/TaskTemplate/ContainerSpec/Privileges/Seccomp", "another seccomp profile than the default"),
    ("/TaskTemplate/ContainerSpec/Privileges/AppArmor", "an AppArmor profile"),
    ("/TaskTemplate/Resources/SwapBytes", "a swap limit"),
];

/// Reads a body.
pub(super) fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    from_value(read(body)?)
}

/// Reads a service's spec.
pub(super) fn parse_service(body: &Bytes) -> Result<skep_api::ServiceSpec, ApiError> {
    let value = read(body)?;
    for (pointer, what) in UNSUPPORTED {
        if value.pointer(pointer).is_some_and(says_something) {
            return Err(ApiError::unsupported(format!("{what} is not supported yet")));
        }
    }
    if let Some(template) = template_in(&value) {
        return Err(ApiError::unsupported(format!(
            "the template {template:?} is not supported yet: write the value out"
        )));
    }
    from_value(value)
}

fn read(body: &Bytes) -> Result<Value, ApiError> {
    if body.is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    let mut value = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("the request's body is no JSON: {error}")))?;
    drop_nulls(&mut value);
    Ok(value)
}

fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    serde_json::from_value(value).map_err(|error| ApiError::bad_request(format!("the request cannot be read: {error}")))
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

/// The first of the fields that may hold templates which does.
fn template_in(spec: &Value) -> Option<&str> {
    let container = spec.pointer("/TaskTemplate/ContainerSpec")?;
    let env = container.get("Env").and_then(Value::as_array).into_iter().flatten();
    let mounts = container.get("Mounts").and_then(Value::as_array).into_iter().flatten();
    let mounts = mounts.flat_map(|mount| [mount.get("Source"), mount.get("Target")].into_iter().flatten());
    let mut fields = env.chain(container.get("Hostname")).chain(mounts).filter_map(Value::as_str);
    fields.find(|text| text.contains("{{"))
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
    fn nulls_are_absent_and_what_is_not_supported_is_refused_by_name() {
        check(r#"{"Name":"a","Labels":null,"TaskTemplate":{"ContainerSpec":{"Image":"i","Env":null}}}"#, Ok(()));
        check(r#"{"Mode":{"ReplicatedJob":{}}}"#, Err("replicated-job"));
        check(r#"{"TaskTemplate":{"Networks":[{"Target":"n"}]}}"#, Err("--network"));
        check(r#"{"TaskTemplate":{"Networks":[]}}"#, Ok(()));
        check(r#"{"TaskTemplate":{"ContainerSpec":{"Hostname":"{{.Node.ID}}"}}}"#, Err("template"));
    }
}
