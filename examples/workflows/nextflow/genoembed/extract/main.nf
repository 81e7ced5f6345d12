process GENOEMBED_EXTRACT {
    tag "$meta.id"
    label 'process_medium'

    conda "${moduleDir}/environment.yml"

    input:
    tuple val(meta), path(sequences)
    val model
    val layer

    output:
    tuple val(meta), path("*.h5")  , emit: embeddings
    tuple val(meta), path("*.json"), emit: report
    path "versions.yml"            , emit: versions

    when:
    task.ext.when == null || task.ext.when

    script:
    def args   = task.ext.args ?: ''
    def prefix = task.ext.prefix ?: "${meta.id}"
    """
    genoembed extract ${sequences} --model ${model} --layer ${layer} --threads ${task.cpus} --resume --json -o ${prefix}.h5 ${args} > ${prefix}.json

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        genoembed: \$(genoembed --version | sed 's/genoembed //')
    END_VERSIONS
    """

    stub:
    def prefix = task.ext.prefix ?: "${meta.id}"
    """
    touch ${prefix}.h5 ${prefix}.json
    touch versions.yml
    """
}
