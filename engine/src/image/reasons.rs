//! Why registries do not do what they are asked, in words for people.

use oci_client::errors::{OciDistributionError, OciErrorCode};
use serde_json::Value;
use skep_api::with_causes;

use super::pull::PullError;

/// Why there is no manifest, in the words that clients look for.
pub(super) fn no_manifest(image: &str, error: &OciDistributionError) -> PullError {
    use OciDistributionError as Error;
    let code = match error {
        Error::RegistryError { envelope, .. } => envelope.errors.first().map(|error| &error.code),
        _ => None,
    };
    let why = match (error, code) {
        (Error::ImageManifestNotFoundError(_), _)
        | (_, Some(OciErrorCode::ManifestUnknown | OciErrorCode::NotFound)) => {
            format!("manifest for {image} not found: manifest unknown")
        }
        (Error::UnauthorizedError { .. } | Error::AuthenticationFailure(_), _)
        | (_, Some(OciErrorCode::NameUnknown | OciErrorCode::Denied | OciErrorCode::Unauthorized)) => {
            format!("pull access denied for {image}, repository does not exist or may require 'docker login'")
        }
        _ => return registry_error(image, error),
    };
    PullError::Absent { image: image.to_owned(), why, reason: told(error) }
}

pub(super) fn registry_error(image: &str, error: &OciDistributionError) -> PullError {
    PullError::Registry { image: image.to_owned(), reason: told(error) }
}

/// What went wrong with a registry, and before it what that means where the words of who tried do not say it.
pub(super) fn told(error: &dyn std::error::Error) -> String {
    let text = with_causes(error);
    match meaning(&text) {
        Some(meaning) => format!("{meaning} ({text})"),
        None => text,
    }
}

fn meaning(text: &str) -> Option<String> {
    let known = [
        ("InvalidContentType", "server gave HTTP response to HTTPS client: name it in insecure-registries if it is to"),
        ("401 Unauthorized", "no basic auth credentials: log in with 'docker login' first"),
        ("RegistryToken", "authorization server did not include a token in the response"),
    ];
    let found = known.into_iter().find(|(words, _)| text.contains(words));
    found.map(|(_, meaning)| meaning.to_owned()).or_else(|| of_json(text))
}

/// What the JSON says that a registry, or who gives out tokens for it, answered with.
fn of_json(text: &str) -> Option<String> {
    let answer: Value = serde_json::from_str(text.get(text.find('{')?..)?).ok()?;
    let first = &answer["errors"][0];
    let member = |names: [&str; 2]| names.into_iter().find_map(|name| first[name].as_str());
    match (member(["code", "Code"]), member(["message", "Message"]), answer["error"].as_str()) {
        (Some(code), Some(message), _) => Some(format!("{}: {message}", code.to_lowercase())),
        (_, _, Some("unauthorized")) => Some("unauthorized: authentication required".to_owned()),
        (code, message, error) => error.or(message).or(code).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Option<&str>) {
        assert_eq!(meaning(text).as_deref(), want, "{text}");
    }

    #[test]
    fn answers_of_registries_are_told_in_words() {
        let denied =
            r#"Authentication failure: {"errors": [{"Code":"UNAUTHORIZED", "message": "a message", "detail": null}]}"#;
        check(denied, Some("unauthorized: a message"));
        check(r#"Authentication failure: {"error": "unauthorized"}"#, Some("unauthorized: authentication required"));
        check(
            "HTTP status client error (401 Unauthorized) for url (x)",
            Some("no basic auth credentials: log in with 'docker login' first"),
        );
        check("something { else", None);
        check("something else", None);
    }
}
