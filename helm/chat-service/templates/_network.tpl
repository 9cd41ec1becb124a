{{/* Rules of NetworkPolicies. */}}

{{/* DNS answers over TCP as well, when it does not fit a datagram. Any address: a node's own cache is no pod. */}}
{{- define "chat-service.dnsEgress" -}}
- ports:
    {{- range .Values.networkPolicy.dnsPorts }}
    - {port: {{ . }}, protocol: UDP}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}

{{/* A rule to ports, to peers if there are any: (list peers ports). */}}
{{- define "chat-service.egressTo" -}}
- ports:
    {{- range last . | uniq }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with first . }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* A rule to one of the chart's own parts: (list $ component port). */}}
{{- define "chat-service.egressToPart" -}}
- ports:
    - {port: {{ last . }}, protocol: TCP}
  to:
    - podSelector:
        matchLabels:
          {{- include "chat-service.selectorLabels" (list (first .) (index . 1)) | nindent 10 }}
{{- end }}

{{- define "chat-service.postgresEgress" -}}
{{- if .Values.postgres.enabled }}
{{- include "chat-service.egressToPart" (list $ "postgres" 5432) }}
{{- else }}
{{- include "chat-service.egressTo" (list .Values.networkPolicy.externalPostgresTo (list (int .Values.externalPostgres.port))) }}
{{- end }}
{{- end }}

{{- define "chat-service.redisEgress" -}}
{{- if .Values.redis.enabled }}
{{- include "chat-service.egressToPart" (list $ "redis" 6379) }}
{{- else }}
{{/* The masters that sentinels name have the ordinary port. */}}
{{- $ports := list (int .Values.externalRedis.port) }}
{{- range .Values.externalRedis.urls }}
{{- $ports = append $ports (splitList ":" (urlParse (replace "$(REDIS_PASSWORD)" "x" .)).host | last | atoi | default 6379) }}
{{- end }}
{{- include "chat-service.egressTo" (list .Values.networkPolicy.externalRedisTo $ports) }}
{{- end }}
{{- end }}

{{/* The ports of the OTLP endpoints, separated by spaces; empty when there is none. */}}
{{- define "chat-service.otlpPorts" -}}
{{- range list "OTEL_EXPORTER_OTLP_ENDPOINT" "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" }}
{{- with index $.Values.config . }}
{{- $url := urlParse . }}
{{- $port := ternary (splitList ":" $url.host | last) "" (regexMatch ":[0-9]+$" $url.host) }}
{{- $port | default (ternary "443" "80" (eq $url.scheme "https")) }} {{ end }}
{{- end }}
{{- end }}
