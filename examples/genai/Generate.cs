// SPDX-License-Identifier: Apache-2.0
// Generates text from an engine folder of target cpu through the C# API (NuGet: Microsoft.ML.OnnxRuntimeGenAI).
//   dotnet run -- ENGINE PROMPT [NEW_TOKENS [DENSITY.onnx_adapter]]
using System;
using System.Collections.Generic;
using Microsoft.ML.OnnxRuntimeGenAI;

public static class Generate
{
    public static void Main(string[] args)
    {
        using (var handle = new OgaHandle())
        using (var model = new Model(args[0])) // finds the op library inside the folder
        using (var tokenizer = new Tokenizer(model))
        using (var adapters = new Adapters(model))
        using (var parameters = new GeneratorParams(model))
        {
            // OPT was trained with </s> in front of every text.
            tokenizer.UpdateOptions(new Dictionary<string, string> { { "add_special_tokens", "true" } });
            int most = args.Length > 2 ? int.Parse(args[2]) : 64;
            using (var prompt = tokenizer.Encode(args[1]))
            using (var stream = tokenizer.CreateStream())
            {
                parameters.SetSearchOption("max_length", prompt[0].Length + most);
                using (var generator = new Generator(model, parameters))
                {
                    if (args.Length > 3) // written by density.py
                    {
                        adapters.LoadAdapter(args[3], "density");
                        generator.SetActiveAdapter(adapters, "density");
                    }
                    generator.AppendTokenSequences(prompt);
                    while (!generator.IsDone())
                    {
                        generator.GenerateNextToken();
                        var sequence = generator.GetSequence(0);
                        Console.Write(stream.Decode(sequence[sequence.Length - 1]));
                    }
                    Console.WriteLine();
                    Console.Error.WriteLine(string.Join(" ", generator.GetSequence(0).ToArray()));
                }
            }
        }
    }
}
