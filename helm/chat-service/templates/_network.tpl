{{/* Rules of NetworkPolicies. */}}

{{/* Also TCP, for answers that do not fit a datagram. Any address, because a DNS cache on the node is not a pod. */}}
{{- define "chat-service.dnsEgress" -}}
- ports:
    {{- range .Values.networkPolicy.dnsPorts }}
    - {port: {{ . }}, protocol: UDP}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}

{{/* An egress rule to ports, limited to peers if any are given: (list peers ports). */}}
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

{{/* An egress rule to a component of the chart: (list $ component port). */}}
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

{{/* As above, and the port of the migration's own Postgres: it bypasses a pooler. */}}
{{- define "chat-service.migrationEgress" -}}
{{- if .Values.postgres.enabled }}
{{- include "chat-service.postgresEgress" . }}
{{- else }}
{{- $ports := list (int .Values.externalPostgres.port) }}
{{- range .Values.migration.extraEnv }}
{{- if and (eq .name "DB_PORT") .value }}
{{- $ports = append $ports (int .value) }}
{{- end }}
{{- end }}
{{- include "chat-service.egressTo" (list .Values.networkPolicy.externalPostgresTo $ports) }}
{{- end }}
{{- end }}

{{- define "chat-service.redisEgress" -}}
{{- if .Values.redis.enabled }}
{{- include "chat-service.egressToPart" (list $ "redis" 6379) }}
{{- else }}
{{/* Besides the sentinels' ports, the master's: externalRedis.port. */}}
{{- $ports := list (int .Values.externalRedis.port) }}
{{- range .Values.externalRedis.urls }}
{{- $ports = append $ports (splitList ":" (urlParse (regexReplaceAll "\\$\\(REDIS_(SENTINEL_)?PASSWORD\\)" . "x")).host | last | atoi | default 6379) }}
{{- end }}
{{- include "chat-service.egressTo" (list .Values.networkPolicy.externalRedisTo $ports) }}
{{- end }}
{{- end }}

{{/*
The ports of the OTLP endpoints, separated by spaces; empty if there is no endpoint. A value in `extraEnv` may refer to other
variables, as in `http://$(HOST_IP):4318`; what they hold is not known here.
*/}}
{{- define "chat-service.otlpPorts" -}}
{{- $names := list "OTEL_EXPORTER_OTLP_ENDPOINT" "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" }}
{{- $urls := list }}
{{- range $names }}
{{- $urls = append $urls (index $.Values.config .) }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if has .name $names }}
{{- $urls = append $urls .value }}
{{- end }}
{{- end }}
{{- range compact $urls }}
{{- if regexMatch "^https?://" . }}
{{- $url := regexReplaceAll "\\$\\([^)]*\\)" . "0" | urlParse }}
{{- $port := ternary (splitList ":" $url.host | last) "" (regexMatch ":[0-9]+$" $url.host) }}
{{- $port = $port | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- if ne $port "0" }}{{ $port }} {{ end }}
{{- end }}
{{- end }}
{{- join " " .Values.networkPolicy.otlpPorts }}
{{- end }}
