//! The extractor for JSON bodies, which reports the faults of all fields at once.

use std::borrow::Cow;
use std::fmt;
use std::time::Instant;

use salvo::extract::{Extractible, Metadata};
use salvo::http::{ParseError, StatusCode};
use salvo::hyper::body::Body as _;
use salvo::{Depot, Request};
use salvo_oapi::{Components, Content, EndpointArgRegister, Operation, RequestBody, Required, ToSchema};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::error::{self, Error, FieldError};
use super::middleware::{app, note_wait};

/// A JSON body of type `T`. Every field of `T` is a [`Text`], which takes any JSON value, so that one pass
/// finds the faults of all fields; the endpoint checks `T` itself.
#[derive(Debug)]
pub(super) struct Body<T>(pub T);

/// A string field as the client sent it, or what it sent instead.
#[derive(Default, Debug)]
pub(super) enum Text {
    #[default]
    Missing,
    Wrong(&'static str),
    Given(String),
}

/// Collects the faults of a request's fields.
#[derive(Default, Debug)]
pub(super) struct Faults(Vec<FieldError>);

impl Faults {
    pub(super) fn add(&mut self, field: &'static str, message: impl Into<Cow<'static, str>>) {
        self.0.push(FieldError { field: Cow::Borrowed(field), message: message.into() });
    }

    /// The field's value as `rule` returns it, or the type's default and a fault. The default is never used: a request
    /// with a fault fails at `check`.
    pub(super) fn take<V: Default>(
        &mut self,
        field: &'static str,
        text: Text,
        rule: impl FnOnce(String) -> Result<V, Cow<'static, str>>,
    ) -> V {
        let outcome = match text {
            Text::Given(text) => rule(text),
            Text::Missing => Err(Cow::Borrowed("is missing: send a string")),
            Text::Wrong(what) => Err(Cow::Owned(format!("is {what}: send a string"))),
        };
        outcome.unwrap_or_else(|message| {
            self.add(field, message);
            V::default()
        })
    }

    pub(super) fn check(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Invalid(self.0)) }
    }
}

impl<'ex, T: DeserializeOwned> Extractible<'ex> for Body<T> {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("Body");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "callers outside the endpoint macro want the concrete error")]
    async fn extract(req: &'ex mut Request, depot: &'ex mut Depot) -> Result<Self, Error> {
        if !is_json(req) {
            return Err(Error::NotJson);
        }
        let config = &app(depot)?.config;
        let (limit_bytes, limit) = (config.max_body_bytes as usize, config.body_timeout());
        // At once: what is refused need not be sent.
        if req.body().size_hint().lower() > limit_bytes as u64 {
            return Err(Error::BodyTooLarge { limit_bytes });
        }
        let started = Instant::now();
        let read = tokio::time::timeout(limit, req.payload_with_max_size(limit_bytes)).await;
        note_wait(depot, started.elapsed());
        let bytes = read.map_err(|_| Error::BodyTooSlow { limit })?.map_err(|error| match error {
            ParseError::PayloadTooLarge => Error::BodyTooLarge { limit_bytes },
            error => Error::BadRequest(format!("the body could not be read: {error}").into()),
        })?;
        parse(bytes).map(Self)
    }
}

fn is_json(req: &Request) -> bool {
    let Some(content_type) = req.headers().get("content-type").and_then(|value| value.to_str().ok()) else {
        return false;
    };
    content_type.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let body =
        |message: Cow<'static, str>| Error::Invalid(vec![FieldError { field: "body".into(), message }]);
    // serde_json looks only into the strings that it keeps, and a body may have fields that nobody reads.
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Error::BadRequest(format!("the body is not UTF-8: byte {}", error.valid_up_to() + 1).into())
    })?;
    let value = serde_json::from_str(text).map_err(|error| {
        if !error.is_data() {
            let (line, column) = (error.line(), error.column());
            return Error::BadRequest(format!("the body is not JSON: line {line}, column {column}").into());
        }
        // A field twice, or no object at all; serde's words name the field and never quote a value that could
        // be a password, because the fields take any value.
        match error.to_string() {
            text if text.starts_with("duplicate field") => body(text.into()),
            _ => body("must be a JSON object".into()),
        }
    })?;
    // serde takes an array for a struct, its elements for the fields in their order.
    match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => Ok(value),
        _ => Err(body("must be a JSON object".into())),
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Text;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Text, E> {
        Ok(Text::Given(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Text, E> {
        Ok(Text::Given(text))
    }

    fn visit_unit<E>(self) -> Result<Text, E> {
        Ok(Text::Wrong("null"))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Text, E> {
        Ok(Text::Wrong("a boolean"))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Text, E> {
        Ok(Text::Wrong("a number"))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Text, E> {
        Ok(Text::Wrong("a number"))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Text, E> {
        Ok(Text::Wrong("a number"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Text, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Text::Wrong("an array"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Text::Wrong("an object"))
    }
}

impl<T: DeserializeOwned + ToSchema> EndpointArgRegister for Body<T> {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let schema = T::to_schema(components);
        operation.request_body = Some(
            RequestBody::new().add_content("application/json", Content::new(schema)).required(Required::True),
        );
        for (status, description) in [
            (StatusCode::BAD_REQUEST, "The body, or a query parameter, does not parse"),
            (StatusCode::REQUEST_TIMEOUT, "The body did not arrive in time; the connection is closed"),
            (StatusCode::PAYLOAD_TOO_LARGE, "The body is larger than MAX_BODY_BYTES"),
            (StatusCode::UNSUPPORTED_MEDIA_TYPE, "The body is not application/json"),
            (StatusCode::UNPROCESSABLE_ENTITY, "Well-formed, but invalid: every invalid field is listed"),
        ] {
            error::document(components, operation, status, description, &[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize, Debug)]
    struct Pair {
        #[serde(default)]
        one: Text,
        #[serde(default)]
        two: Text,
    }

    fn faults(json: &str) -> Vec<String> {
        let pair: Pair = parse(json.as_bytes()).expect("well-formed");
        let mut faults = Faults::default();
        let _: String = faults.take("one", pair.one, Ok);
        let _: String = faults.take("two", pair.two, Ok);
        match faults.check() {
            Err(Error::Invalid(errors)) => {
                errors.iter().map(|e| format!("{} {}", e.field, e.message)).collect()
            }
            _ => Vec::new(),
        }
    }

    #[test]
    fn every_wrong_field_is_named_with_what_it_is() {
        for (value, what) in [
            ("null", "null"),
            ("true", "a boolean"),
            ("-1", "a number"),
            ("1.5", "a number"),
            ("[[1], {}]", "an array"),
            ("{\"a\": [1]}", "an object"),
        ] {
            let faults = faults(&format!("{{\"one\": {value}}}"));
            assert_eq!(
                faults,
                [format!("one is {what}: send a string"), "two is missing: send a string".into()]
            );
        }
        assert!(faults("{\"one\": \"a\", \"two\": \"b\", \"three\": 3}").is_empty());
    }

    #[test]
    fn invalid_json_is_distinguished_from_json_of_the_wrong_shape() {
        for text in ["", "{", "{\"one\": }", "nonsense", "{} {}", "{\"one\": \"\\ud800\"}", "\u{feff}{}"] {
            assert!(matches!(parse::<Pair>(text.as_bytes()), Err(Error::BadRequest(_))), "{text}");
        }
        for text in ["[]", "1", "\"text\"", "null", "{\"one\": \"a\", \"one\": \"b\"}"] {
            assert!(matches!(parse::<Pair>(text.as_bytes()), Err(Error::Invalid(_))), "{text}");
        }
    }

    #[test]
    fn invalid_utf_8_is_refused_wherever_it_is() {
        for body in [
            &b"{\"one\": \"\xff\"}"[..],
            b"{\"one\": \"a\", \"ignored\": \"\xff\"}",
            b"{\"ignored\": {\"deep\": [\"\xed\xa0\x80\"]}}",
            b"{\"ign\xc3ored\": 1}",
            b"{\"one\": [\"\xc0\xaf\"]}",
            b"{\"one\": {\"\xff\": 1}}",
            b"[\"\xff\"]",
            b"{}\xff",
            b"\xff",
        ] {
            let answer = parse::<Pair>(body);
            assert!(matches!(answer, Err(Error::BadRequest(_))), "{}", body.escape_ascii());
        }
        assert!(parse::<Pair>("{\"ignored\": \"é🦀\"}".as_bytes()).is_ok());
    }
}
